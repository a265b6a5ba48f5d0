"""Write the pages that follow from the code and from results/: docs/catalog.md, docs/results.md and the catalog table of README.md.

`make docs` runs it; tests/test_docs.py fails when a page is not what it would write.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import remanence as rm
from remanence.catalog import Entry
from remanence.recipes.memory_table import table, verdicts

ROOT = Path(__file__).resolve().parent.parent
ABOUT = {
    "associative-retrieval": (
        "`remanence train associative-retrieval`: exact match by number of pairs; both trained on at most 5 pairs, 3,200 steps "
        "of 64 sequences, states of equal size."
    ),
    "babilong": (
        "QA1 of the shipped model, facts over the whole context, *Moby-Dick* as the haystack. memory off: the same model, fresh "
        "state, the last 512 tokens. `remanence eval babilong --lengths 0,1k,4k,16k,1M --samples 32 --batch 8`: eight streams "
        "at a time, on a machine that was doing other work; the cost of one stream is under `cost`."
    ),
    "babilong-10M": (
        "The shipped model at ten million tokens of *Moby-Dick*, again and again, facts over the whole of it, streams read side by side: "
        "`remanence eval babilong --lengths 10M --samples 6 --batch 6 --window 0`, one thread of a machine that was doing other work."
    ),
    "babilong-50M": (
        "One stream of fifty million tokens: `remanence eval babilong --lengths 50M --samples 1 --batch 1 --window 0 --seed 1`, one "
        "thread of a machine that was doing other work. The fact that the answer needs is 5.3 million tokens back. One right answer is "
        "not a rate; ARMT's published 79.9 % is one."
    ),
    "cost": (
        "One stream read by the shipped model on a quiet machine; what counts is seconds per 1,000 tokens and peak memory, not "
        "the single answer. `remanence eval babilong --lengths 16k,64k,256k,1M --samples 1 --batch 1 --window 0 --json "
        "results/cost.json`."
    ),
    "quickstart-fast": (
        "`remanence train quickstart --fast`: QA1 in the book that training never saw, facts over the whole context, after 7 "
        "minutes of training on two cores."
    ),
    "speed": (
        "`remanence bench speed`: width 256, 4 heads, batch 1, float32, one process, ours and the peer taking turns, medians. "
        "Tokens a second and, in brackets, as a ratio to the peer (above 1: ours is faster), where there is one, and to two linear layers."
    ),
    "decode": (
        "`remanence bench decode`: one token of an 8-layer Decoder of width 512 beside its linear layers alone, one thread, CPU "
        "time; eager and through torch.compile."
    ),
    "gradients": (
        "`remanence bench gradients --segments 4,16,64 --repeats 3` (uio-llms: `--segments 4,16`): forward and backward over that many "
        "segments of 64 tokens, two rows, two layers of attention of width 64, float32, one thread; CPU time, medians, methods taking "
        "turns. bptt: full back-propagation through time; recompute: with the activations of each segment computed again; replay: MRBP; "
        "k2: windows of k2 + 1 segments; uio: UIO-LLMs' incremental scheme, by chunks kept, for uio-llms only, whose segments are "
        "compressed one by one; curriculum: the mean step of a schedule with as many steps at each of 1, 2, 4 .. segments. peak_bytes: "
        "tensors made in the step, gradients among them. gradient_error: |g - g_bptt| / |g_bptt| at random weights and tokens: what "
        "truncation loses there, not what it costs a trained memory."
    ),
    "memory-table": (
        "`remanence report memory --jobs 2`: a decoder of one million parameters, trained on books and on keys and values, with every "
        "memory around it or in its layers' place, 800 updates on recall and 150 on books each, segments of 32 tokens. Accuracies in "
        "percent. stream N: keys last "
        "seen N tokens ago or more (up to twice as many), in unseen streams; n pairs: recalled across a segment of noise; next segment and "
        "4k later: four pairs asked without any noise and after 4,096 tokens of it; passkey to: the longest stream after which one pair is "
        "known nine times in ten; writes: the value of a key that was written 8 times, and how often an older one is given; bits a byte of "
        "an unseen book, and from its 512th byte on; x speed: of reading, beside the bare backbone with a window; MB: tensors of a "
        "training step. Not tried further: a length after one that failed."
    ),
    "search": (
        "`remanence bench search --lengths 10k,100k`: usearch's graph beside exact search over keys of 64 numbers, 200 queries at once, "
        "on a machine that was doing other work. A matrix product over 100,000 keys is faster than the graph; the graph is for more keys "
        "than are worth reading."
    ),
    "mqar": (
        "`remanence train mqar`: multi-query associative recall, 16 pairs in 64 tokens; a gated short convolution and then one layer of "
        "the mixer, width 64; at most 500 updates of 16 sequences, one learning rate. Accuracy over bytes of state, for every mixer "
        "of the catalog that trains in minutes; a dot in the figure is a mixer that was run with one setting."
    ),
    "chomsky": (
        "`remanence train chomsky`: parity (regular), reversing (context-free) and duplicating (context-sensitive) a string, trained on "
        "1 to 40 symbols, tested on up to 200. The published score is the mean over lengths above 40."
    ),
    "copying": (
        "`remanence train copying`, stopped after four cells: copying strings of letters, trained up to 20, tested up to 60; two layers of "
        "width 128, all decoders with as many parameters as the one of attention."
    ),
    "icll": (
        "`remanence train icll --mixers attention,mingru`: languages of small automata, new in every document, learned in context: how "
        "often the likeliest letter is a legal one, and the total variation to the true distribution (`distance`), by the number of words "
        "read."
    ),
    "icl-regression": (
        "`remanence train icl-regression`: linear regression in context, 5 dimensions, 16 points: squared error by the number of pairs "
        "told, in units of the variance of w . x, beside the reference predictors on the same sequences (ridge with the right "
        "penalty is the Bayes predictor)."
    ),
    "ihead-birth": (
        "`remanence train ihead-birth`: bigrams and the three associative memories of an induction head while a two-layer attention-only "
        "model learns them, by update."
    ),
    "verbatim-recall": (
        "`remanence train verbatim-recall`: surprisal of a list of words that stands in the text for a second time, in percent of that of "
        "the first, by the number of words and by the tokens between."
    ),
    "newton": (
        "`remanence train newton`: ParaRNN's Newton iterations at initial weights: the largest residual before each, in "
        "float64, and seconds forward and backward against the loop over tokens."
    ),
    "read-twice": ("`remanence train read-twice`: set disjointness with the long list first, told once and told twice."),
    "selective-copying": (
        "`remanence train selective-copying`: data tokens among 16 times as many of noise, said again in order; two layers of "
        "width 64 (or `depth`)."
    ),
    "state-collapse": (
        "`remanence train state-collapse`: a byte-level model trained on 256 tokens at a time reads an unseen book to 16k "
        "tokens, as it is and with fixes that need no training."
    ),
    "state-tracking": (
        "`remanence train state-tracking`: words over a finite group, trained at up to 40 elements, tested at up to 256; two "
        "layers of width 64."
    ),
    "statex": (
        "`remanence train statex --mixers mamba2`: a small Mamba-2 trained on MQAR, expanded in one layer of four, trained on, "
        "against training on without expansion. One seed; a development run of 1,200 + 240 steps, while other work shared the "
        "machine."
    ),
    "arrow-pointing": (
        "`remanence train arrow-pointing`: does the arrow point at the disc? Trained on 64 x 64 pictures, tested there and on 128 x 128."
    ),
}
"""What each file of results/ is and the command that makes it."""
BEGIN, END = "<!-- catalog: made by `make docs` -->", "<!-- end of catalog -->"


def arxiv(paper: str) -> str:
    """'arXiv:2412.06464' as a link."""
    name, _, number = paper.partition(":")
    return f"[{paper}](https://arxiv.org/abs/{number})" if name == "arXiv" else paper


def kinds() -> list[str]:
    return sorted({entry.kind for entry in rm.catalog()})


def summary_table() -> str:
    """One row a kind: how many, and which."""
    lines = ["| kind | systems |", "|---|---|"]
    for kind in kinds():
        lines.append(f"| {kind} | {', '.join(f'`{entry.slug}`' for entry in rm.catalog(kind))} |")
    return "\n".join(lines)


def measured_state(entry: Entry) -> str:
    """Bytes of a mixer's state at width 256 after 512 and 4096 tokens, measured: equal if it is constant."""
    import torch

    mixer = rm.mixer(entry.slug, dim=256)
    with torch.no_grad():
        sizes = [mixer(torch.zeros(1, n, 256))[1].nbytes for n in (512, 4096)]
    return f"{sizes[0]:,} bytes" if sizes[0] == sizes[1] else f"{sizes[0]:,} bytes after 512 tokens, {sizes[1]:,} after 4096"


def parity_of(entry: Entry, measured: dict[str, dict[str, float]]) -> str:
    """What a system is checked against, with the error that the comparison showed where it was written down."""
    found = [f"{source}, relative error {error:.0e}" for source, error in sorted(measured.get(entry.slug, {}).items())]
    return "; ".join([entry.parity] * bool(entry.parity) + [f"measured: {', '.join(found)}"] * bool(found))


def catalog_page() -> str:
    recorded = ROOT / "results" / "parity" / "parity.json"
    measured = json.loads(recorded.read_text(encoding="utf-8")) if recorded.exists() else {}
    parts = [
        "# Catalog",
        "",
        "Made by `make docs` from the register that `remanence list` reads. Every mixer, segment memory and model here passes the laws",
        "of tests/laws, but for the exemptions named: any cut of a sequence, states as values, padding and packing, and agreement of the",
        "forms (naive, step and chunk where there is a `backend` to choose; one for any length otherwise). State sizes are of one row.",
    ]
    for kind in kinds():
        parts += ["", f"## {kind}", ""]
        for entry in [entry for entry in rm.catalog(kind) if entry.kind == kind]:
            parts += [f"### `{entry.slug}`: {entry.name}", "", f"{arxiv(entry.paper)}, {entry.year}.", ""]
            parts += ["```text", inspect.getdoc(entry.builder) or "", "```"]
            facts = []
            if entry.aliases:
                facts.append(f"Also called {', '.join(f'`{alias}`' for alias in entry.aliases)}.")
            if "mixer" in entry.kinds:
                formula = f"{entry.state} numbers; " if entry.state else ""
                facts.append(f"State: {formula}{measured_state(entry)} at width 256 with default settings, float32.")
                forms = "naive, step, chunk" if "backend" in inspect.signature(entry.builder).parameters else "one, for any length"
                facts.append(f"Forms: {forms}.")
            if parity := parity_of(entry, measured):
                facts.append(f"Parity: {parity}.")
            if entry.claim:
                facts.append(f"Claim: {entry.claim.rstrip('.')}.")
            if entry.recipe:
                names = [name.strip() for name in entry.recipe.split(",")]
                facts.append(f"Measured: {', '.join(f'[{name}](results.md#{name})' for name in names)}.")
            facts += [f"Exempt from the law `{law}`: {reason}" for law, reason in entry.exempt.items()]
            parts += ["", *[f"- {fact}" for fact in facts], ""] if facts else [""]
    return "\n".join(parts) + "\n"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def babilong_rows(rows: list[dict[str, Any]]) -> list[str]:
    head = "| length | memory | accuracy % | 95 % interval | n | tokens/s | s per 1k tokens | state bytes | peak RSS MB |"
    lines = [head, "|---" * 9 + "|"]
    for row in rows:
        interval = f"{percent(row['low'])} to {percent(row['high'])}"
        lines.append(
            f"| {row['length']:,} | {row['memory']} | {percent(row['accuracy'])} | {interval} | {row['n']} | {row['tokens_per_s']:,.0f} "
            f"| {row['seconds_per_1k']:.4f} | {row['state_bytes']:,} | {row['peak_rss_mb']:.0f} |"
        )
    return lines


def speed_rows(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each mixer and length; in brackets the ratio to the peer, where there is one, and to the floor."""
    lines = ["| mixer | tokens | forward | forward+backward | decode B=1 | B=16 | state bytes | peer |", "|---" * 8 + "|"]
    cells: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["mixer"], row["length"]), {})[row["pass"]] = row
    for (mixer, length), own in cells.items():
        said = []
        for name in ("forward", "forward+backward", "decode B=1", "decode B=16"):
            row = own.get(name)
            ratios = [] if row is None else [f"{ratio:.2f}" for ratio in (row["ratio_to_peer"], row["ratio_to_floor"]) if ratio is not None]
            said.append("" if row is None else f"{row['tokens_per_s']:,.0f} ({', '.join(ratios)})")
        state = next((row["state_bytes"] for row in own.values() if row.get("state_bytes") is not None), None)
        peer = next((row["peer"] for row in own.values() if row["peer"]), "")
        lines.append(f"| {mixer} | {length:,} | {' | '.join(said)} | {'' if state is None else f'{state:,}'} | {peer} |")
    return lines


def memory_rows(rows: list[dict[str, Any]]) -> list[str]:
    """The table and the verdicts of `remanence report memory`."""
    head, *lines = table(rows)
    text = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(line) + " |" for line in lines), ""]
    return text + [f"- {verdict}" for verdict in verdicts(rows)]


def _said(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def plain_rows(rows: list[dict[str, Any]]) -> list[str]:
    """Any rows of plain values, in the order of their keys; what is the same in all of them stands above."""
    keys = list(dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, (str, int, float)) or value is None))
    same = [key for key in keys if len(rows) > 1 and len({row.get(key) for row in rows}) == 1]
    keys = [key for key in keys if key not in same]
    above = ["In every row: " + ", ".join(f"{key} {_said(rows[0][key])}" for key in same) + ".", ""] if same else []
    lines = ["| " + " | ".join(_said(row.get(key)) for key in keys) + " |" for row in rows]
    return [*above, "| " + " | ".join(keys) + " |", "|" + "---|" * len(keys), *lines]


@dataclass(frozen=True)
class Wide:
    """A table with a line for each value of the keys `of`, and a column for each value of `axis`, which shows `value`.

    also: columns more, which are the same along a line, or else the last. where: only the rows with these values.
    """

    axis: str
    value: str = "accuracy"
    of: tuple[str, ...] = ("memory",)
    also: tuple[str, ...] = ("state_bytes", "parameters", "steps", "seconds")
    where: tuple[tuple[str, Any], ...] = ()

    def __call__(self, rows: list[dict[str, Any]]) -> list[str]:
        rows = [row for row in rows if self.axis in row and all(row.get(key) == value for key, value in self.where)]
        values = sorted({row[self.axis] for row in rows})
        lines: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in sorted(rows, key=lambda row: row[self.axis]):
            lines.setdefault(tuple(row[key] for key in self.of), {}).update(row | {f"at {row[self.axis]}": row[self.value]})
        also = [key for key in self.also if any(key in row for row in rows)]
        columns = [*self.of, *also, *(f"at {value}" for value in values)]
        order = {tuple(row[key] for key in self.of): i for i, row in reversed(list(enumerate(rows)))}
        ordered = [lines[line] for line in sorted(lines, key=order.__getitem__)]
        body = ["| " + " | ".join(_said(line.get(column)) for column in columns) + " |" for line in ordered]
        head = [*self.of, *also, *(f"{self.axis} {_said(value)}" for value in values)]
        return [f"{self.value}:", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body]


def birth_rows(rows: list[dict[str, Any]]) -> list[str]:
    """The claims of ihead-birth, and a measurement of every tenth of the run."""
    measured = [row for row in rows if "steps" in row]
    said = {True: "seen", False: "not seen"}
    claims = [f"- {row['memory']}: {row['claim']}: {said[row['holds']]}, {row['births']}" for row in rows if "claim" in row]
    ends: dict[str, int] = {row["memory"]: row["steps"] for row in measured}
    some = [row for row in measured if row["steps"] * 10 % ends[row["memory"]] == 0]
    return [*claims, "", *plain_rows([{key: value for key, value in row.items() if key != "seconds"} for row in some])]


SHOWN: dict[str, tuple[Callable[[list[dict[str, Any]]], list[str]], ...]] = {
    "memory-table": (memory_rows,),
    "ihead-birth": (birth_rows,),
    "associative-retrieval": (Wide("pairs"),),
    "mqar": (Wide("pairs"),),
    "selective-copying": (Wide("data"),),
    "state-collapse": (Wide("fix", "bits_per_byte", ("position",), ()),),
    "state-tracking": (Wide("length"),),
    "chomsky": (Wide("length", also=("parameters", "steps", "seconds")),),
    "copying": (Wide("length", also=("parameters", "steps", "seconds")),),
    "icll": (Wide("strings", also=("parameters", "steps", "seconds")), Wide("strings", "distance", also=())),
    "icl-regression": (Wide("examples", "mse", also=("parameters", "nearest", "seconds")),),
    "verbatim-recall": (
        Wide("words", "surprisal_percent", ("memory", "condition"), ("parameters", "seconds"), (("gap_from", 0),)),
        Wide("gap_from", "surprisal_percent", ("memory", "condition"), (), (("words", 10),)),
    ),
}
"""How the rows of a file are shown, where it is not as they are."""


def results_page() -> str:
    about = "Made by `make docs` from the JSON files in results/, each of which names the settings, seed, commit and machine of its run."
    parts = ["# Results", "", about]
    for path in sorted((ROOT / "results").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        rows, meta = content["rows"], content.get("meta", {})
        environment = meta.get("environment", {})
        parts += ["", f"## {path.stem}", ""]
        parts += [ABOUT.get(path.stem, ""), ""]
        facts = [f"{key} {environment[key]}" for key in ("cpu", "threads", "torch", "commit") if environment.get(key) is not None]
        if facts:
            parts += ["Measured with " + ", ".join(facts) + ".", ""]
        keys = set(rows[0]) if rows else set()
        show = babilong_rows if {"low", "peak_rss_mb"} <= keys else speed_rows if "ratio_to_floor" in keys else plain_rows
        for number, shown in enumerate(SHOWN.get(path.stem, (show,))):
            parts += ([""] if number else []) + (shown(rows) if rows else ["No rows."])
        if path.with_suffix(".png").exists():
            parts += ["", f"![{path.stem}](../results/{path.stem}.png)"]
    return "\n".join(parts) + "\n"


def readme(text: str) -> str:
    """README with its catalog table made again."""
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    return f"{head}{BEGIN}\n{summary_table()}\n{END}{tail}"


def pages() -> dict[Path, str]:
    """What each generated file should hold."""
    front = ROOT / "README.md"
    return {
        ROOT / "docs" / "catalog.md": catalog_page(),
        ROOT / "docs" / "results.md": results_page(),
        front: readme(front.read_text(encoding="utf-8")),
    }


def main() -> None:
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
