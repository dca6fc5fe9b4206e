"""Fixtures of the model, training and evaluation tests: a tiny corpus, tiny settings, and models of both."""

import contextlib
import os
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import Settings, make_model
from model import GPT, GPTConfig

torch.set_num_threads(1)  # models this small run faster without threads


@dataclass(frozen=True, eq=False)
class Corpus:
    """What `helpers` reads of a data set; made with `dataclasses.replace` into others."""

    name: str
    title: str
    stand_in: bool
    fingerprint: str
    vocab_size: int
    splits: dict
    bytes: dict
    words: dict
    first_context: int
    tokenizer: object


@pytest.fixture(scope="session")
def corpus():
    """A few hundred short sentences by character, with the structure of language: words, order, line ends."""
    rng = np.random.default_rng(7)
    parts = ("the a", "old red small", "dog cat bird hen", "sees hears likes", "the a", "tree house river bird")
    texts = {
        split: "".join(" ".join(rng.choice(part.split()) for part in parts) + "\n" for _ in range(sentences))
        for split, sentences in (("train", 150), ("val", 20), ("test", 20))
    }
    chars = sorted(set("".join(texts.values())))
    ids = {char: i for i, char in enumerate(chars)}
    tokenizer = SimpleNamespace(
        name="char",
        vocab_size=len(chars),
        encode=lambda text: [ids[char] for char in text],
        decode=lambda tokens: "".join(chars[i] for i in tokens),
    )
    return Corpus(
        name="tiny",
        title="Tiny sentences",
        stand_in=False,
        fingerprint="0123456789abcdef",
        vocab_size=len(chars),
        splits={split: np.array(tokenizer.encode(text), dtype=np.uint16) for split, text in texts.items()},
        bytes={split: len(text.encode()) for split, text in texts.items()},
        words={split: len(text.split()) + text.count("\n") for split, text in texts.items()},
        first_context=ids["\n"],
        tokenizer=tokenizer,
    )


@pytest.fixture
def settings():
    """A run of well under a second that still has dropout, warm-up, clipping, accumulation and evaluations."""
    return Settings(
        batch_size=4, block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.1, learning_rate=1e-2, min_lr=1e-3,
        max_iters=20, warmup_iters=3, gradient_accumulation_steps=2, eval_interval=5, eval_iters=3,
    )  # fmt: skip


@pytest.fixture
def model(settings, corpus):
    """The untrained model of that run."""
    return make_model(settings, corpus)


# what the report switches on beyond the plan, one by one and all together
SWITCHES = [{"rotary": True}, {"qk_norm": True}, {"squared_relu": True}, {"rms_norm": True}, {"pointer": True}]
SWITCHES.append({name: True for switch in SWITCHES for name in switch})


@pytest.fixture(params=[{}, *SWITCHES], ids=lambda switches: "+".join(switches) or "plan")
def switches(request):
    return request.param


@pytest.fixture
def lively():
    """Makes a small model whose weights are so large that its predictions are far from uniform."""

    def make(vocab_size=23, block_size=12, n_layer=2, n_head=2, n_embd=16, bias=True, seed=0, scale=0.4, dropout=0.0, **switches):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(vocab_size, block_size, n_layer, n_head, n_embd, dropout, bias, **switches))
        for parameter in model.parameters():
            parameter.data += scale * torch.randn_like(parameter)
        return model.eval()

    return make


@pytest.fixture
def cuda():
    """The CUDA device; tests that ask for it are skipped where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and this machine has none")
    return torch.device("cuda")


@pytest.fixture
def fault(record_property):
    """`with fault("kill -9"):` around each time a fault is tried; it held if the block raises nothing."""

    @contextlib.contextmanager
    def attempt(name):
        held = False
        try:
            yield
            held = True
        finally:
            record_property("fault", (name, held))

    return attempt


def pytest_terminal_summary(terminalreporter):
    """The long version of test_faults.py ends with the table of what was tried, as counted."""
    if os.environ.get("FAULTS_LONG", "0") in ("", "0"):
        return
    tried = {}
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        for name, value in report.user_properties:
            if name == "fault" and report.when == "call":
                tried.setdefault(value[0], []).append(value[1])
    rows = [f"| {name} | {len(held)} | {'all' if all(held) else sum(held)} |" for name, held in tried.items()]
    if rows:
        terminalreporter.write_line("\n".join(["", "| fault | times tried | held |", "| --- | --- | --- |", *rows]))
