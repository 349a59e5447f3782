"""What a GHN is to predict for a network, and what it knows of the vocabulary."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import timm
import torch

from timm_ghn import GHN, ComputationGraph, GHNConfig, predict, trace
from timm_ghn.hypernet.config import PUBLISHED_PRIMITIVES
from timm_ghn.plan import Layout, Plan, Role, Target, make_plan

CONFIG = GHNConfig(10, (16, 16, 3, 3), hid=8, branch_scale=0.5, primitives=PUBLISHED_PRIMITIVES)


@cache
def graph(name: str) -> ComputationGraph:
    with torch.device("meta"):
        return trace(timm.create_model(name))


def plan(name: str, config: GHNConfig = CONFIG, predict_head: bool = True) -> Plan:
    return make_plan(graph(name), config, GHN(config).decoder.decoded_shape, predict_head)


def targets(name: str, config: GHNConfig = CONFIG, predict_head: bool = True) -> dict[str, Target]:
    return {target.name: target for target in plan(name, config, predict_head).targets}


def test_every_parameter_has_its_role() -> None:
    found = targets("vit_tiny_patch16_224")
    expected = {
        "pos_embed": (Role.POSITIONS, Layout.TOKENS),
        "patch_embed.proj.weight": (Role.WEIGHT, Layout.KERNEL),
        "patch_embed.proj.bias": (Role.BIAS, Layout.VECTOR),
        "blocks.0.norm1.weight": (Role.NORM_WEIGHT, Layout.VECTOR),
        "blocks.0.norm1.bias": (Role.NORM_BIAS, Layout.VECTOR),
        "blocks.0.mlp.fc1.weight": (Role.WEIGHT, Layout.MATRIX),
        "head.weight": (Role.CLASS_WEIGHT, Layout.MATRIX),
        "head.bias": (Role.CLASS_BIAS, Layout.VECTOR),
    }
    assert {name: (found[name].role, found[name].layout) for name in expected} == expected
    assert "cls_token" not in found
    scale = targets("convnext_atto")["stages.0.blocks.0.gamma"]
    assert (scale.role, scale.node, scale.gain) == (Role.CONSTANT, None, 0.5)


@pytest.mark.parametrize(("predict_head", "seen"), [(True, (1000, 512)), (False, (10, 512))])
def test_a_head_that_is_kept_is_seen_with_the_checkpoints_classes(predict_head: bool, seen: tuple[int, int]) -> None:
    found = plan("resnet18", predict_head=predict_head)
    assert found.shapes[found.graph.names.index("fc.weight")] == seen
    assert ("fc.weight" in {target.name for target in found.targets}) == predict_head


def test_a_gain_is_of_the_whole_parameter_not_of_what_is_decoded() -> None:
    wide = targets("resnet18")["layer4.1.conv2.weight"]
    assert wide.decoded == (16, 16, 3, 3)
    assert wide.gain == pytest.approx((2 / (512 * 9)) ** 0.5)
    assert targets("vit_tiny_patch16_224")["pos_embed"].gain == 1


# ---- the vocabulary -------------------------------------------------------------------------------------------------


def make(config: GHNConfig) -> GHN:
    torch.manual_seed(0)
    return GHN(config).eval()


def test_a_checkpoint_that_says_nothing_knows_the_published_primitives() -> None:
    config = GHNConfig.from_dict({"num_classes": 10})
    assert config.primitives == PUBLISHED_PRIMITIVES
    assert "primitives" not in config.to_dict()
    grown = replace(config, primitives=(*PUBLISHED_PRIMITIVES, "token"))
    assert GHNConfig.from_dict(grown.to_dict()) == grown != config


@pytest.mark.parametrize("primitives", [("conv",), ("input", "conv", "conv"), ("input", 3), ("input",) * 2, ()])
def test_a_vocabulary_that_cannot_be_is_refused(primitives: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="GHN config: primitives"):
        GHNConfig(10, primitives=primitives)


def test_rows_are_found_by_name_wherever_they_stand() -> None:
    published = make(CONFIG)
    other = make(replace(CONFIG, primitives=("added", *reversed(PUBLISHED_PRIMITIVES))))
    state = published.state_dict()
    state["embed.weight"] = torch.cat((torch.full((1, 8), torch.nan), state["embed.weight"].flip(0)))
    other.load_state_dict(state)
    with torch.no_grad():
        (expected,), (found,) = published([graph("resnet18")]), other([graph("resnet18")])
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(("name", "unknown"), [("seresnet50", "cse"), ("vit_tiny_patch16_224", "pos_enc")])
def test_a_primitive_that_a_checkpoint_does_not_know_is_contracted(name: str, unknown: str) -> None:
    config = replace(CONFIG, primitives=tuple(p for p in PUBLISHED_PRIMITIVES if p != unknown))
    whole, known = graph(name), graph(name).within(config.primitives)
    assert unknown in whole.ops and unknown not in known.ops
    # What read from such a node reads from what it read, and a sum with nothing left to add is none.
    assert known.ops.count("conv") == whole.ops.count("conv")
    assert len(whole) - len(known) == whole.ops.count(unknown) * (2 if unknown == "pos_enc" else 1)
    assert whole.within(PUBLISHED_PRIMITIVES) is whole
    with torch.device("meta"):
        model = timm.create_model(name)
    report = predict(model, make(config)).report
    assert report.kept.get("pos_embed", "no primitive for it") == "no primitive for it"
    assert report.predicted.keys() | report.kept.keys() == dict(model.named_parameters()).keys()
