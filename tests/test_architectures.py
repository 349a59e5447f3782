"""Architectures by index: the same everywhere, in one split only, as costly as they say, and buildable."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from timm_ghn.graph import trace
from timm_ghn.hypernet.config import PUBLISHED_PRIMITIVES
from timm_ghn.training.architectures import SPLITS, Architecture, architecture, families
from timm_ghn.training.families import FAMILIES
from timm_ghn.training.sampling import Draw

CASES = [
    (source, split, name)
    for source, splits in SPLITS.items()
    for split, plan in splits.items()
    if split not in ("val", "test")
    for name in plan.families
]
JOINED = [name for name in families("timm", max_tier=3) if FAMILIES["timm"][name].tier == 3]
CASES += [("timm", "train", name) for name in JOINED]

# The networks that these places of the splits have always held. A change here is a change of every published figure.
PINNED = {
    ("timm", "train", 0): "8bd93f403e138750",
    ("timm", "train", 999_999): "4dd812099748cc66",
    ("timm", "val", 0): "0e4040423872c8b6",
    ("timm", "test", 499): "122c829fc2d9e4c9",
    ("deepnets", "train", 123_456): "a868d3e4c80f62ea",
    ("deepnets", "test", 0): "1a2bab7a5bce3771",
    ("deepnets", "wide", 1): "42e9ad74ddba04ed",
    ("deepnets", "deep", 2): "bffcd017f4deafc3",
    ("deepnets", "dense", 3): "89e29dc35fcec6f5",
    ("deepnets", "bnfree", 99): "434e4b428f7bb315",
}


# And a hash over the first two hundred of each.
PINNED_SPLITS = {
    ("timm", "train"): "d889a37c19394ea9",
    ("timm", "val"): "d1464573099a7e2a",
    ("timm", "test"): "e741a80f41452ed6",
    ("deepnets", "train"): "9fbaa90852703cc7",
    ("deepnets", "val"): "9de87623dbdb34be",
    ("deepnets", "test"): "96c73ef3f7d49a58",
    ("deepnets", "wide"): "e5b6fc6cf5faddd6",
    ("deepnets", "deep"): "e7cfb7dbfc9fcf06",
    ("deepnets", "dense"): "4c95be1a6508742f",
    ("deepnets", "bnfree"): "b79a71be1f19e1ab",
}

# And the first training network of each family that no split draws.
PINNED_FAMILIES = {
    "vit_patch2": "7a04a2a3679f715e",
    "vit_patch4": "b38f1b8e4fe91728",
    "eva": "bcf1dcbd43a5368c",
    "cait": "849cf33d3c6075f4",
    "xcit": "a0d0e34af5c16e68",
    "swin_deep": "49c08f708a55f1b8",
    "swinv2": "fd6a673154f4a48b",
    "pvtv2": "3725b0d963ddbdfc",
    "levit": "c00815a1f49a0fba",
    "mobilevit": "b816794313cde008",
    "mobilevitv2": "4dbfe731135b07e7",
    "coatnet": "b902c31be6940c6a",
    "maxvit": "4fa9b53b1f3c9beb",
    "mobile_same": "a536edbe3c42a4ce",
    "resnetv2": "ed953e37e1cfbc02",
    "resnetv2_group": "2237f63aada64842",
    "residual_group": "dbbf4cf282ed225f",
    "nfnet": "4ba71950b8263bf2",
    "separable": "578338919a8da3bd",
    "mixnet": "c361a6f75d699ab7",
    "mobileone": "770cda9f37f209ff",
    "ghostnet": "deeb662e59e619e7",
    "fasternet": "be57382091f7c94c",
    "starnet": "3d8164aa7ba2b310",
    "inception_next": "98f9c0496168ac10",
    "repvit": "b76f3be755f86fc4",
    "fastvit": "7e645f85705ffa82",
    "tresnet": "64190d845074637b",
    "hgnet": "b0a4e34bac2da937",
    "mambaout": "6923c45fa853db65",
    "focalnet": "50b0f3a479bd0b66",
    "rdnet": "c1a611fa430cb5bd",
    "gmlp": "ccef43a42f812a1c",
    "resmlp": "b9cd2a83eff483ea",
    "davit": "29b69f6116e937c9",
    "twins": "90abc51ad6b84e3a",
    "pit": "7092769a12c6e77a",
    "beit": "7b9a151d6b8599bb",
    "convit": "4cb4980a23b4e2fa",
    "swiftformer": "e6913aa592fdbd9e",
    "efficientvit": "867b17047b1e98dc",
    "mvit": "7edf671a2ef378aa",
    "tnt": "826663bd25e8077f",
}


def first_of(source: str, split: str, name: str, index: int = 0) -> Architecture:
    return architecture(source, split, index, families=[name])


def test_families_by_tier() -> None:
    assert {(source, name) for source, _, name in CASES} == {
        (s, name) for s, names in FAMILIES.items() for name in names
    }
    assert families("timm", max_tier=0) == ("plain", "residual", "bottleneck")
    assert families("timm", max_tier=2) == SPLITS["timm"]["train"].families
    assert families("deepnets", max_tier=3) == SPLITS["deepnets"]["train"].families, "none out of distribution"
    assert len(JOINED) > 10


def test_pinned() -> None:
    assert {place: architecture(*place).key for place in PINNED} == PINNED
    found = {}
    for source, split in PINNED_SPLITS:
        count = min(200, SPLITS[source][split].size)
        keys = [architecture(source, split, index).key for index in range(count)]
        found[source, split] = hashlib.blake2b(" ".join(keys).encode(), digest_size=8).hexdigest()
    assert found == PINNED_SPLITS
    assert {name: first_of("timm", "train", name).key for name in JOINED} == PINNED_FAMILIES


@pytest.mark.slow
def test_same_in_another_process() -> None:
    program = (
        "import json, sys; from timm_ghn.training.architectures import architecture;"
        "print(json.dumps([architecture(*place).key for place in json.loads(sys.argv[1])]))"
    )
    places = [(source, split, index) for source in SPLITS for split in ("train", "val") for index in range(10)]
    answer = subprocess.run([sys.executable, "-c", program, json.dumps(places)], capture_output=True, check=True)
    assert json.loads(answer.stdout) == [architecture(*place).key for place in places]


def test_draws_leave_global_random_state_alone() -> None:
    before = random.getstate(), torch.get_rng_state()
    architecture("timm", "train", 5).skeleton(10)
    architecture("timm", "train", 5, families=["eva"]).skeleton(10)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("source", SPLITS)
def test_splits_are_disjoint_and_varied(source: str) -> None:
    # Families of the out-of-distribution splits have names of their own; only what is built counts here.
    keys = {
        split: [replace(architecture(source, split, index), family="").key for index in range(100)]
        for split in SPLITS[source]
    }
    for split, found in keys.items():
        assert len(set(found)) > 90
        for other in set(keys) - {split}:
            assert not set(found) & set(keys[other])


def test_splits_are_disjoint_where_networks_are_few() -> None:
    """ConvMixer has some two thousand configurations: independent draws would meet again and again."""
    keys = {
        split: {first_of("timm", split, "convmixer", index).key for index in range(300)}
        for split in ("train", "val", "test")
    }
    assert not keys["train"] & keys["val"] and not keys["train"] & keys["test"] and not keys["val"] & keys["test"]


@pytest.mark.parametrize("name", JOINED)
def test_splits_of_families_by_name_are_disjoint(name: str) -> None:
    keys = {
        split: {first_of("timm", split, name, index).key for index in range(4)} for split in ("train", "val", "test")
    }
    assert {split: {key[0] in "01" for key in found} for split, found in keys.items()} == {
        "train": {False}, "val": {True}, "test": {True},
    }  # fmt: skip
    assert not keys["val"] & keys["test"]


# What the graphs of timm's models of these kinds have no node for either.
KEPT = {"cls_token", "reg_token", "latent", "freqs", "temperature", "logit_scale", "attention_biases", "gamma"}
KEPT |= {"gain", "skipinit_gain", "alpha", "beta", "ls", "gating_param"}


@pytest.mark.parametrize("name", JOINED)
def test_whatever_is_drawn_can_be_built(name: str) -> None:
    draw = Draw("any", name)
    for _ in range(20):
        Architecture("timm", name, FAMILIES["timm"][name].sample(draw)).skeleton(10)


@pytest.mark.parametrize("name", JOINED)
def test_as_much_is_predicted_as_of_real_models(name: str) -> None:
    for index in range(3):
        candidate = first_of("timm", "train", name, index)
        graph = trace(candidate.skeleton(10), None if candidate.fixed_size else (3, 224, 224))
        kept = {parameter.rpartition(".")[2].rstrip("_0123456789") for parameter in graph.kept}
        assert kept <= KEPT | {"relative_position_bias_table"}, candidate
        assert len(graph.head) in (2, 4)  # some with a second one, for distillation
        assert graph.shapes[graph.names.index(graph.head[0])][0] == 10  # type: ignore[index]


@pytest.mark.parametrize(("source", "split", "name"), CASES)
@pytest.mark.parametrize(("num_classes", "in_chans", "size"), [(10, 3, 32), (200, 1, 64)])
def test_cost_is_exact(source: str, split: str, name: str, num_classes: int, in_chans: int, size: int) -> None:
    candidate = first_of(source, split, name, size)
    if size == 32:
        assert candidate.cost().macs <= SPLITS[source][split].max_macs
        assert candidate.cost().params <= SPLITS[source][split].max_params
    cost = candidate.cost(num_classes, in_chans, size)
    model = candidate.skeleton(num_classes, in_chans, size).eval()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        output = model(torch.empty(1, in_chans, size, size))
    assert output.shape == (1, num_classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == cost.params, candidate
    assert counter.get_total_flops() == 2 * cost.macs, candidate


@pytest.mark.parametrize(("source", "split", "name"), [case for case in CASES if case[1] == "train"])
def test_runs_with_gradients_to_every_parameter(source: str, split: str, name: str) -> None:
    model = architecture(source, split, 1, families=[name], max_macs=6_000_000).build(10).train()
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert [n for n, parameter in model.named_parameters() if parameter.grad is None] == []


def test_skeleton_is_the_module_without_memory() -> None:
    candidate = first_of("timm", "train", "caformer")
    real, skeleton = candidate.build(10), candidate.skeleton(10)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (real, skeleton)]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
def test_all_primitives_occur() -> None:
    for source in FAMILIES:
        seen: Counter[str] = Counter()
        for index in range(24):
            names = SPLITS[source]["train"].families
            name = names[index % len(names)]
            candidate = first_of(source, "train", name, index)
            size = 32 if candidate.fixed_size else 224
            seen.update(trace(candidate.skeleton(10), (3, size, size)).ops)
        missing = set(PUBLISHED_PRIMITIVES) - set(seen)
        assert missing <= ({"dil_conv"} if source == "timm" else set()), source


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "torch"}, "Unknown architecture source 'torch'; choose from timm, deepnets"),
        ({"split": "deep"}, "has no split 'deep'; choose from train, val, test"),
        ({"index": 1_000_000}, "Index 1000000 is outside"),
        ({"index": -1}, "Index -1 is outside"),
        ({"families": ["resnet"]}, r"Families \['resnet'\] are not among"),
        ({"families": []}, r"Families \[\] are not among"),
        ({"families": ["swin"], "max_macs": 1000}, "No 'swin' network within 1,000"),
    ],
)
def test_refusals(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        architecture(**{"source": "timm", "split": "train", "index": 0, **arguments})  # type: ignore[arg-type]
