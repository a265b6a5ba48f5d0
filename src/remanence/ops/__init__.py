"""The mathematics: plain functions on tensors [B, T, H, K], one folder per rule, four words per rule (naive, step, chunk, and the rule itself)."""
