"""Kernels work in vectors of full width on every instruction set, and the reader of assembly can tell."""

import os
import subprocess
import sys

import pytest
from sweeps import apart, processors

from numbaloss.bench import widths
from numbaloss.loss import registry

# Not in vectors, for a reason: a few operations a row, not an element; and what libm computes, a power in
# float64 and arctan.
BY_ROW = {"conclude", "nll_terms", "nll_gradient", "share_of_tiles", "sequences"}
BY_LIBM = ("focal_cross_entropy float64", "general_robust_loss float64", "arctan_loss")
# In which LLVM finds no gain on SSE4.2, which fuses nothing and takes roots of two numbers one by one.
ON_SSE = (
    "pseudo_huber_loss float64",
    "cosine_embedding_loss float32 value: measure_cosine",
    "cosine_embedding_loss float64 value: measure_cosine",
    "contrastive_loss float64 value: measure_differences",
)


@pytest.mark.sweep
@pytest.mark.parametrize("processor", processors())
@pytest.mark.parametrize("others", [False, True])
def test_kernels_are_of_full_width(processor, others):
    names = [name for name, loss in registry.items() if apart(loss) == others]
    environment = {**os.environ, "NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": ""}
    command = [sys.executable, "-m", "numbaloss.bench.widths", *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    *lines, count = done.stdout.splitlines()
    assert int(count.split()[0]) > 3 * len(names) and not done.stderr, done.stderr or done.stdout
    known = (*BY_LIBM, *ON_SSE) if processor == "nehalem" else BY_LIBM
    assert not [line for line in lines if line.split(": ")[1] not in BY_ROW and not line.startswith(known)]


WHOLE = """
f:
.LBB0_1:
\tvmovups\t(%rsi,%rax), %ymm0
\tvmulps\t%ymm0, %ymm0, %ymm1
\tvfmadd213ps\t%ymm0, %ymm1, %ymm2
\tvmovups\t%ymm2, (%rdx,%rax)
\tjne\t.LBB0_1
.LBB0_2:
\tvmulss\t%xmm0, %xmm0, %xmm1
\tjne\t.LBB0_2
\tretq
"""


def test_a_narrower_loop_is_seen():
    assert widths.verdict(WHOLE, 32) == widths.Verdict(32, "")  # the last elements are done one by one
    assert "in vectors of 32 bytes" in widths.verdict(WHOLE, 64).complaint
    assert "in vectors of 16 bytes" in widths.verdict(WHOLE.replace("ymm", "xmm"), 32).complaint
    alone = WHOLE.replace("ymm", "xmm").replace("ps\t", "ss\t").replace("213ps", "213ss")
    assert "one number at a time" in widths.verdict(alone.replace("mulps", "mulss"), 32).complaint
    divided = WHOLE.replace("vmulss", "vdivss")  # no vector divides
    assert "one number at a time" in widths.verdict(divided, 32).complaint
    called = WHOLE.replace("\tvmovups\t%ymm2", "\tmovabsq\t$expf, %rcx\n\tcallq\t*%rcx\n\tvmovups\t%ymm2")
    assert "calls expf" in widths.verdict(called, 32).complaint


def test_vectors_of_arm_are_read():
    loop = ".LBB0_1:\n\tfmla\tv0.4s, v1.4s, v2.4s\n\tfmul\tv3.4s, v0.4s, v1.4s\n\tb.ne\t.LBB0_1\n"
    assert widths.verdict(loop, 16) == widths.Verdict(16, "")
    alone = loop.replace("v0.4s, v1.4s, v2.4s", "s0, s1, s2").replace("v3.4s, v0.4s, v1.4s", "s3, s0, s1")
    assert "one number at a time" in widths.verdict(alone, 16).complaint
