"""Patterns over operator types and names."""

from __future__ import annotations

import pytest

from onnxptq.errors import SelectorError
from onnxptq.selectors import compile_pattern, match_nodes, match_tensors

NAMES = {
    "/blocks.0/attn/qkv": ("/blocks.0/attn/qkv", "qkv_out"),
    "/blocks.1/attn/qkv": ("/blocks.1/attn/qkv",),
    "/head/Gemm": ("/head/Gemm", "logits"),
    "Conv_1": ("Conv_1", "features[0]"),
}
OPS = {
    "/blocks.0/attn/qkv": "MatMul",
    "/blocks.1/attn/qkv": "MatMul",
    "/head/Gemm": "Gemm",
    "Conv_1": "Conv",
}


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("MatMul", {"/blocks.0/attn/qkv", "/blocks.1/attn/qkv"}),
        ("Conv", {"Conv_1"}),
        ("*/attn/*", {"/blocks.0/attn/qkv", "/blocks.1/attn/qkv"}),
        ("logits", {"/head/Gemm"}),
        ("features[0]", {"Conv_1"}),
        ("re:blocks\\.[0-9]/", {"/blocks.0/attn/qkv", "/blocks.1/attn/qkv"}),
        ("re:^/head", {"/head/Gemm"}),
        ("*", set(NAMES)),
        ("/blocks.?/attn/qkv", {"/blocks.0/attn/qkv", "/blocks.1/attn/qkv"}),
    ],
)
def test_patterns(pattern: str, wanted: set[str]) -> None:
    assert match_nodes(pattern, NAMES, OPS, option="--exclude") == wanted


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("matmul", "MatMul"),
        ("Convolution", "Conv"),
        ("*/attention/*", None),
        ("/head/gemm", "/head/Gemm"),
        ("qkv", "qkv_out"),
        ("re:logit$", "logits"),
        ("/blocks.3/attn/qkv", "/blocks.0/attn/qkv"),
    ],
)
def test_a_pattern_that_matches_nothing_suggests_what_might(pattern: str, near: str | None) -> None:
    with pytest.raises(SelectorError, match="matches no operator type and no name") as caught:
        match_nodes(pattern, NAMES, OPS, option="--include")
    assert "--include" in caught.value.message
    assert pattern in caught.value.message
    if near is None:
        assert "inspect" in caught.value.remedy
    else:
        assert near in caught.value.remedy


def test_case_matters_for_names() -> None:
    assert not compile_pattern("*/ATTN/*")("/blocks.0/attn/qkv")


def test_invalid_expressions_are_named() -> None:
    with pytest.raises(SelectorError, match="not a valid regular expression"):
        match_nodes("re:(", NAMES, OPS, option="--exclude")


def test_tensors() -> None:
    names = ["a", "b.c", "b.d"]
    assert match_tensors("b.*", names, option="rule") == {"b.c", "b.d"}
    with pytest.raises(SelectorError, match=r"rule 'b\.e'"):
        match_tensors("b.e", names, option="rule")
    with pytest.raises(SelectorError):
        match_tensors("anything", [], option="rule")
