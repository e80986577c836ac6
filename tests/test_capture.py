"""Capturing a causal rotary model with grouped heads that the test itself trains on English text."""

import json
import subprocess
import sys
from pydoc_data.topics import topics

import pytest
import torch

from linbench.capture import Request, capture
from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.inputs import draw
from linbench.inputs.traces import opened

pytestmark = pytest.mark.peers
TOKENS = 3000


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the model, and one with the text it has not seen."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("model")
    english = [topics[name] for name in sorted(topics, key=lambda name: -len(topics[name]))[1:12]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(english, tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=["?"]))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=600, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=4096,
        )
    )  # fmt: skip
    ids = torch.tensor(tokenizer.encode("\n".join(english)).ids)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(250):
        starts = torch.randint(len(ids) - 128, (8,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([ids[start : start + 128] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    model.save_pretrained(folder)
    text = folder / "unseen.txt"
    text.write_text(topics["specialnames"], encoding="utf-8")
    return folder, text


def test_a_long_real_trace_of_grouped_heads_is_kept_and_read(trained, tmp_path):
    folder, text = trained
    out = tmp_path / "traces" / "llama.safetensors"
    said = capture(Request(str(folder), [text], out, tokens=TOKENS))
    assert said.endswith("layers 0, 1, 2, 1 texts of 3000 tokens, 4 heads (2 of keys) of dimension 16")
    source = opened(out)
    assert (source.heads, source.tokens, source.key_dim, source.layers) == (4, TOKENS, 16, (0, 1, 2))
    assert source.metadata["causal"] == "true"
    assert float(source.metadata["attention_error"]) < 1e-5
    parameters = {"file": str(out), "layer": 1}
    q, k, _ = draw(
        Cell(
            mechanism="softmax",
            length=TOKENS,
            heads=4,
            head_dim=16,
            value_dim=16,
            inputs="trace",
            inputs_parameters=parameters,
        )
    )
    assert torch.equal(k[:, 0], k[:, 1])
    assert not torch.equal(k[:, 1], k[:, 2])
    scores = (q @ k.mT / 4).masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf)
    weights = scores.softmax(-1)[:, :, -1]
    assert weights.amax() > 5 / TOKENS  # trained attention is far from even


def test_chosen_layers_and_heads_alone_are_kept(trained, tmp_path):
    folder, text = trained
    whole, part = tmp_path / "whole.safetensors", tmp_path / "part.safetensors"
    capture(Request(str(folder), [text], whole, layers=[2], tokens=64))
    capture(Request(str(folder), [text], part, layers=[2], heads=[3, 1], tokens=64))
    sizes = {"length": 64, "head_dim": 16, "value_dim": 16, "inputs": "trace"}
    four = draw(Cell(mechanism="softmax", heads=4, inputs_parameters={"file": str(whole)}, **sizes))
    two = draw(Cell(mechanism="softmax", heads=2, inputs_parameters={"file": str(part)}, **sizes))
    assert all(torch.equal(a[:, [3, 1]], b) for a, b in zip(four, two, strict=True))


def test_what_cannot_be_captured_is_one_sentence(trained, tmp_path):
    folder, text = trained
    out = tmp_path / "x.safetensors"
    for request, said in (
        (Request(str(folder), [text], out, layers=[7], tokens=16), "layer 7: .* has the layers 0 … 2"),
        (Request(str(folder), [text], out, heads=[4], tokens=16), "head 4: .* has the heads 0 … 3"),
        (Request(str(folder), [tmp_path / "none.txt"], out), "the text .*none.txt cannot be read"),
        (Request(str(tmp_path / "nothing"), [text], out), "nothing cannot be loaded"),
        (Request(str(folder), [text], out, tokens=10**6), "1000000 are asked for"),
    ):
        with pytest.raises(UsageError, match=said):
            capture(request)


def test_the_command_captures_and_a_sweep_reads_the_file(trained, tmp_path):
    folder, text = trained
    linbench = [sys.executable, "-m", "linbench"]
    words = ["capture", str(folder), "--text", str(text), "--out", "t.safetensors", "--tokens", "256"]
    subprocess.run([*linbench, *words], cwd=tmp_path, check=True, timeout=300)
    sweep = ["run", "inputs=t.safetensors", "mechanism=[softmax,linear]", "length=256", "heads=4", "head_dim=16"]
    sweep += ["causal=true", "measure=[error]", "results_dir=results"]
    subprocess.run([*linbench, *sweep], cwd=tmp_path, check=True, timeout=300)
    (file,) = (tmp_path / "results").glob("*/*.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert {record["cell"]["mechanism"]: record["status"] for record in records} == {"softmax": "ok", "linear": "ok"}
