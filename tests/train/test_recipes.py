import json
import math

import pytest
import torch

import remanence as rm
from remanence.errors import UnknownName, UsageError
from remanence.recipes import associative_retrieval as assoc
from remanence.recipes import lm_books
from remanence.tokenizers import load_tokenizer
from remanence.train import Run, Stream, find_recipe, recipes


def test_discovery():
    assert {"associative-retrieval", "lm-books"} <= set(recipes()) and not any(name.startswith("-") for name in recipes())
    assert find_recipe("lm-books") is lm_books and find_recipe("associative_retrieval") is assoc
    with pytest.raises(UnknownName, match="lm-books"):
        find_recipe("lm-book")


def test_the_two_states_are_equal_in_size():
    rmt, armt = (assoc.state_bytes(assoc.build(slug, 0)) for slug in ("rmt", "armt"))
    floats = assoc.armt_floats(assoc.DIM, assoc.LAYERS, assoc.ARMT_KEY_DIM, assoc.NU)
    assert armt == 4 * floats and rmt == 4 * assoc.DIM * assoc.rmt_tokens(floats, assoc.DIM)
    assert armt <= rmt < 1.02 * armt


def test_associative_retrieval(tmp_path, capsys):
    run = assoc.recipe(out=tmp_path, fast=True, device="cpu")
    assert isinstance(run, Run) and [part.name for part in (run, *run.others)] == ["rmt", "armt"]
    assert "bytes a row" in capsys.readouterr().out
    ends = run.start(tmp_path, quiet=True)
    assert set(ends) == {"rmt", "armt"} and 0 <= ends["rmt"]["eval/accuracy"] <= 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(row["memory"], row["pairs"]) for row in results["rows"]] == [(m, p) for m in ("rmt", "armt") for p in assoc.TESTED[:3]]
    assert {"accuracy", "n", "state_bytes", "trained_pairs"} <= results["rows"][0].keys() and "torch" in results["meta"]["environment"]
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert type(rm.load(tmp_path / "armt" / "last")).__name__ == "ARMT"


def test_results_of_several_runs_join(tmp_path):
    for slug in ("armt", "gated-deltanet", "armt"):
        row = assoc.recipe(fast=True, device="cpu", memory=slug, steps=2).start(tmp_path, quiet=True)
        assert row["step"] == 2 and (tmp_path / slug / "best").is_dir()
    results = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert sorted(row["memory"] for row in results) == ["armt"] * 3 + ["gated-deltanet"] * 3


def test_accuracy_of_a_perfect_memory():
    """The scoring agrees with the task's oracle: a model that looks its answer up is right, one that does not is not."""

    class Oracle:
        device = torch.device("cpu")

        def __init__(self, wrong: int):
            self.task, self.wrong = rm.task("assoc-retrieval"), wrong

        def __call__(self, ids, state=None, logits="all"):
            from remanence.models import Output
            from remanence.tasks import TokenExample

            whole = ids if state is None else torch.cat([state, ids], 1)
            if logits == "none":
                return Output(None, whole, None)
            rows = [torch.from_numpy(self.task.oracle(TokenExample(row.numpy(), row.numpy()))) for row in whole]
            guess = torch.stack(rows)[:, -ids.shape[1] :]
            guess[: self.wrong, -2] = 99
            return Output(torch.nn.functional.one_hot(guess, 103).float(), whole, None)

    assert assoc.accuracy(Oracle(0), 7, 20, 0) == 1.0 and assoc.accuracy(Oracle(5), 7, 20, 0) == 0.75


def test_bits_by_position():
    """A uniform model pays log2(vocab) bits a token; every position but the first is in exactly one bucket, carried or not."""

    model = rm.Decoder(rm.ModelConfig(vocab=16, dim=8, layers=[{"mixer": "gated-deltanet", "heads": 2}])).eval()
    torch.nn.init.zeros_(model.embedding.weight)
    documents = [torch.randint(16, (300,)), torch.randint(16, (70,))]
    sizes = torch.full((16,), 2)
    for carry in (True, False):
        rows = lm_books.bits_by_position(model, documents, sizes, 50, carry)
        assert [(row["from"], row["to"]) for row in rows] == [(1, 64), (64, 128), (128, 256), (256, 512)]
        assert [row["bytes"] for row in rows] == [2 * n for n in (63 + 63, 64 + 6, 128, 44)]
        assert all(row["bits_per_byte"] == pytest.approx(2.0) for row in rows) and lm_books.mean_bits(rows) == pytest.approx(2.0)


def test_carried_nll_is_that_of_the_whole_document():
    torch.manual_seed(0)
    model = rm.Decoder(rm.ModelConfig(vocab=16, dim=8, layers=[{"mixer": "gated-deltanet", "heads": 2}])).eval()
    ids = torch.randint(16, (90,))
    whole = -model(ids[None, :-1]).logits[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0].detach()
    assert torch.allclose(lm_books.nll_by_token(model, ids, 20, True), whole, rtol=1e-4, atol=1e-5)
    dropped = lm_books.nll_by_token(model, ids, 20, False)
    assert torch.allclose(dropped[:20], whole[:20], rtol=1e-4, atol=1e-5) and not torch.allclose(dropped, whole, rtol=1e-3)


@pytest.mark.parametrize("memory", ["gated-deltanet", "rmt"])
def test_lm_books(tmp_path, memory):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("the cat sat on the mat and looked at the moon. " * 60)
    run = lm_books.recipe(out=tmp_path / "out", data=tmp_path, fast=True, device="cpu", memory=memory)
    assert isinstance(run.data, Stream) and run.data.starts.sum() == 2
    row = run.start(tmp_path / "out", quiet=True)
    assert row["step"] == 4 and math.isfinite(row["eval/bits_per_byte"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["state"] for row in results["rows"]} == {"carried", "dropped"} == set(results["meta"]["bits_per_byte"][memory])
    assert (tmp_path / "out" / "curve.png").exists()
    model, tokenizer = rm.load(tmp_path / "out" / "model"), load_tokenizer(tmp_path / "out" / "model")
    assert model.vocab == tokenizer.vocab_size


def test_refusals(tmp_path):
    with pytest.raises(UsageError, match="reads no folder"):
        assoc.recipe(data=tmp_path)
    with pytest.raises(UsageError, match="named once"):
        assoc.recipe(memory="rmt,rmt")
    with pytest.raises(UnknownName, match="armt"):
        assoc.recipe(memory="amrt")
    with pytest.raises(UsageError, match="no .txt file"):
        lm_books.recipe(data=tmp_path)
