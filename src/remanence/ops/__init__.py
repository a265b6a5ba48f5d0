"""The mathematics: plain functions on tensors [B, T, H, K], one folder a rule, four words a rule (naive, step, chunk, and the rule)."""
