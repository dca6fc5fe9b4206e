"""Fixtures of the model, training and evaluation tests: a tiny data set, configuration and models.

python -m pytest tests

The fault table at the end of a run with FAULTS_LONG=1 is made here.
"""

import contextlib
import os
import signal

import numpy as np
import pytest
import torch

from data.dataset import CharTokenizer, load
from data.prepare import write_set
from helpers import TrainConfig, make_model
from model import GPT, GPTConfig

torch.set_num_threads(1)  # models this small run faster without threads
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A prepared set of short sentences by character: words, their order and line ends."""
    rng = np.random.default_rng(7)
    parts = ("the a", "old red small", "dog cat bird hen", "sees hears likes", "the a", "tree den")
    sentences = [" ".join(rng.choice(part.split()) for part in parts) + "\n" for _ in range(190)]
    texts = {"train": sentences[:150], "val": sentences[150:170], "test": sentences[170:]}
    folder = tmp_path_factory.mktemp("data") / "tiny"
    folder.mkdir()
    facts = {"title": "Tiny sentences", "variant": "own", "source": "none", "licence": "none"}
    facts |= {"source_sha256": {}, "split_rule": "by sentences"}
    tokenizer = CharTokenizer("".join(sorted(set("".join(sentences)))))
    write_set(folder, ((split, "".join(lines)) for split, lines in texts.items()), tokenizer, facts)
    return load(folder)


@pytest.fixture
def config():
    """A run of well under a second, with dropout, warm-up, clipping, micro-steps, evaluations."""
    shape = dict(batch_size=4, block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.1)
    rate = dict(learning_rate=1e-2, min_lr=1e-3, max_iters=20, warmup_iters=3)
    rest = dict(gradient_accumulation_steps=2, eval_interval=5, eval_iters=3)
    return TrainConfig(**shape, **rate, **rest)


@pytest.fixture
def model(config, corpus):
    """The untrained model of that run."""
    return make_model(config, corpus)


# the architecture options that nanoGPT has not, one by one and all together
OPTIONS = [{"rotary": True}, {"rms_norm": True}, {"attn_gate": True}]
OPTIONS.append({"pointer": True})
OPTIONS.append({name: True for option in OPTIONS for name in option})


@pytest.fixture(params=[{}, *OPTIONS], ids=lambda options: "+".join(options) or "plain")
def switches(request):
    """Each choice of architecture options in turn, as keywords of GPTConfig."""
    return request.param


@pytest.fixture
def lively():
    """Makes a small model with weights so large that its predictions are far from uniform."""

    def make(vocab_size=23, block_size=12, seed=0, scale=0.4, **options):
        shape = dict(n_layer=2, n_head=2, n_embd=16, dropout=0.0) | options
        torch.manual_seed(seed)
        model = GPT(GPTConfig(vocab_size, block_size, **shape))
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
    """`with fault("kill -9"):` around each trial; it held if the block raises nothing."""

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
    """Ends the long version of test_faults.py with a table of what was tried, as counted."""
    if os.environ.get("FAULTS_LONG", "0") in ("", "0"):
        return
    tried = {}
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        for name, value in report.user_properties:
            if name == "fault" and report.when == "call":
                tried.setdefault(value[0], []).append(value[1])
    if tried:
        terminalreporter.write_line("\n| fault | times tried | passed |\n| --- | --- | --- |")
    for name, held in tried.items():
        count = "all" if all(held) else sum(held)
        terminalreporter.write_line(f"| {name} | {len(held)} | {count} |")
