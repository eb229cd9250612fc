"""Patterns over operator types and names."""

from __future__ import annotations

import pytest

from onnxptq.errors import SelectorError
from onnxptq.listing import listed
from onnxptq.selectors import Catalogue, compile_pattern, match_tensors, select_nodes
from onnxptq.types import UserNode

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
CATALOGUE = Catalogue(
    names=NAMES,
    op_types=OPS,
    user_nodes=[
        UserNode(name="/head/Gemm", op="Gemm", outputs=("logits",), homes=("/head/Gemm",)),
        UserNode(name="/stem/bn", op="BatchNormalization", outputs=("features[0]",), homes=("Conv_1",)),
        UserNode(name="/stem/shape", op="Shape", outputs=("sizes",), homes=(), reason="folded"),
        UserNode(name="/stem/lost", op="Odd", outputs=("odd",), homes=("rewritten since",)),
    ],
    constants={"w1": ["Conv_1"], "unread": []},
    source="net.onnx",
)


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
    assert select_nodes(pattern, CATALOGUE, option="--exclude").nodes == wanted


def test_types_and_names_of_merged_nodes_choose_what_took_them_in() -> None:
    for pattern in ("BatchNormalization", "/stem/bn", "re:/bn$", "/stem/*"):
        found = select_nodes(pattern, CATALOGUE, option="--exclude")
        assert found.nodes == {"Conv_1"}
        assert [node.name for node in found.moved] == ["/stem/bn"]
        assert found.by_name == (frozenset() if pattern == "BatchNormalization" else {"Conv_1"})
    assert select_nodes("/head/Gemm", CATALOGUE, option="--exclude").moved == ()


@pytest.mark.parametrize(
    ("pattern", "said"), [("Shape", "folded"), ("sizes", "folded"), ("/stem/lost", "rewritten")]
)
def test_nothing_is_left_of_what_a_pattern_names(pattern: str, said: str) -> None:
    with pytest.raises(SelectorError, match=f"'{pattern}' matches only nodes of which .* nothing: .*{said}"):
        select_nodes(pattern, CATALOGUE, option="--exclude")


def test_constants_are_no_nodes() -> None:
    with pytest.raises(SelectorError, match="only what nodes read: 'w1'") as caught:
        select_nodes("w*", CATALOGUE, option="--exclude")
    assert "'Conv_1'" in caught.value.remedy
    with pytest.raises(SelectorError, match="matches no operator type, no node"):
        select_nodes("unread", CATALOGUE, option="--exclude")


def test_long_lists_are_cut() -> None:
    assert listed(["a", "b", "c", "d"]) == "a, b, c, d"
    assert listed(["a", "b", "c", "d", "e", "f"]) == "a, b, c, d and 2 more"


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
        ("Batchnorm", "BatchNormalization"),
        ("/stem/size", "/stem/shape"),
    ],
)
def test_a_pattern_that_matches_nothing_suggests_what_might(pattern: str, near: str | None) -> None:
    with pytest.raises(SelectorError, match="matches no operator type, no node") as caught:
        select_nodes(pattern, CATALOGUE, option="--include")
    assert "--include" in caught.value.message
    assert pattern in caught.value.message
    if near is None:
        assert "'onnxptq inspect net.onnx --names'" in caught.value.remedy
    else:
        assert near in caught.value.remedy


def test_case_matters_for_names() -> None:
    assert not compile_pattern("*/ATTN/*")("/blocks.0/attn/qkv")


def test_invalid_expressions_are_named() -> None:
    with pytest.raises(SelectorError, match="not a valid regular expression"):
        select_nodes("re:(", CATALOGUE, option="--exclude")


def test_tensors() -> None:
    names = ["a", "b.c", "b.d"]
    assert match_tensors("b.*", names, option="rule") == {"b.c", "b.d"}
    with pytest.raises(SelectorError, match=r"rule 'b\.e'"):
        match_tensors("b.e", names, option="rule")
    with pytest.raises(SelectorError):
        match_tensors("anything", [], option="rule")
