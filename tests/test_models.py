"""Networks: what goes in and comes out, and where their weights come from."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")  # the `train` extra

import torch
from safetensors.torch import save_file

from dfengine.bundle import AudioSettings
from dfengine.errors import OptionError
from training.checkpoint import read_tensors
from training.errors import CheckpointError, WeightsError
from training.models import LstmSettings, ModelSettings, Network, ReluLstm, WithDetail, make_network

AUDIO = AudioSettings(seconds=0.5)
SMALL = {"input_hw": (32, 32)}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("settings", "features"),
    [
        ({"backbone": "face_net"}, 160),
        ({"backbone": "conv_pool"}, 32 * 15 * 15),
        ({"backbone": "inception_resnet_v1", "input_hw": (80, 80)}, 512),
        ({"backbone": "mobilenetv3_small_050"}, 1024),
        ({"backbone": "mobilenetv3_small_050", "pool": "max"}, 1024),
    ],
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else "",
)
def test_a_backbone_with_a_head(settings: dict, features: int) -> None:
    head = ("norm", "dropout:0.75", "linear:8", "relu", "norm", "dropout:0.75")
    network = Network(ModelSettings(**SMALL | settings, head=head)).eval()
    assert [type(layer).__name__ for layer in network.head] == [
        "BatchNorm1d", "Dropout", "Linear", "ReLU", "BatchNorm1d", "Dropout", "Linear",
    ]  # fmt: skip
    assert network.head[2].in_features == features
    assert network(torch.rand(3, 3, *network.settings.input_hw)).shape == (3, 1)
    assert network.settings.kind == "frame"


def test_face_net_is_given_fine_detail() -> None:
    with_detail = WithDetail()
    flat = torch.full((1, 3, 32, 32), 0.3)
    assert with_detail(flat).shape == (1, 6, 32, 32)
    torch.testing.assert_close(with_detail(flat)[:, 3:], torch.zeros(1, 3, 32, 32), rtol=0, atol=1e-6)
    ramp = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    assert with_detail(ramp)[:, 3:, :, 2:-2].abs().max() < 1e-5, "what changes evenly is no detail"
    noise = 0.02 * torch.rand(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        both = with_detail(flat + noise)
    torch.testing.assert_close(both, with_detail(flat + noise), rtol=0, atol=0, msg="never in bfloat16")
    assert both[:, 3:].std() > 4 * noise.std()
    torch.testing.assert_close(both[:, :3], flat + noise)


def test_published_weights_of_inception_fit_a_network_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of the one is loaded into the other."""
    monkeypatch.setattr("facenet_pytorch.models.inception_resnet_v1.load_weights", lambda *_: None)
    settings = ModelSettings(backbone="inception_resnet_v1", input_hw=(80, 80), pretrained=True)
    Network(settings, fetch=False).load_state_dict(Network(settings).state_dict())


def test_max_and_average_pooling_differ() -> None:
    x = torch.rand(2, 3, 64, 64)
    made = {pool: make_network(ModelSettings(backbone="resnet18", pool=pool), 0).eval() for pool in ("avg", "max")}
    made["max"].load_state_dict(made["avg"].state_dict())
    assert (made["max"].backbone(x) >= made["avg"].backbone(x) - 1e-5).all()
    assert not torch.allclose(made["max"](x), made["avg"](x))


def test_the_seed_decides_the_weights() -> None:
    a, b, c = (make_network(ModelSettings(), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["head.0.weight"], c["head.0.weight"])


def clip_settings(**changes: object) -> ModelSettings:
    fields = {"backbone": "conv_pool", "input_hw": (8, 8), "clip_frames": 3, "lstm": LstmSettings(width=5)}
    return ModelSettings(**fields | changes)


@pytest.mark.parametrize(
    "lstm", [LstmSettings(width=5, layers=2, dropout=0.5), LstmSettings(width=5, activation="relu")]
)
def test_a_clip_network_sees_order(lstm: LstmSettings) -> None:
    network = make_network(clip_settings(lstm=lstm), 0).eval()
    x = torch.rand(4, 3, 3, 8, 8)
    logits = network(x)
    assert network.settings.kind == "clip"
    assert logits.shape == (4, 1)
    torch.testing.assert_close(network(x[1:2]), logits[1:2])
    assert not torch.allclose(network(x.flip(1)), logits)


def test_the_relu_lstm_against_its_definition(rng: np.random.Generator) -> None:
    lstm = ReluLstm(4, 3)
    x = rng.normal(size=(2, 5, 4)).astype(np.float32)
    w, u, b, c = (p.detach().double().numpy() for p in lstm.cell.parameters())
    h = state = np.zeros((2, 3))
    for t in range(5):
        i, f, g, o = np.split(x[:, t] @ w.T + b + h @ u.T + c, 4, axis=1)
        i, f, o = (1 / (1 + np.exp(-v)) for v in (i, f, o))
        state = f * state + i * np.maximum(g, 0)
        h = o * np.maximum(state, 0)
    np.testing.assert_allclose(lstm(torch.from_numpy(x))[0][:, -1].detach().numpy(), h, atol=1e-6)


def test_a_relu_lstm_begins_in_bounds() -> None:
    network = make_network(ModelSettings(
        backbone="conv_pool", input_hw=(100, 100), clip_frames=60, lstm=LstmSettings(width=16, activation="relu")
    ), 0).eval()  # fmt: skip
    with torch.no_grad():
        assert network(torch.rand(2, 60, 3, 100, 100) * 2 - 1).abs().max() < 100


def test_a_network_that_hears() -> None:
    network = make_network(clip_settings(audio_width=6, audio=AUDIO), 0).eval()
    assert network.settings.kind == "audio"
    x, sound = torch.rand(2, 3, 3, 8, 8), torch.rand(2, AUDIO.bands, AUDIO.frames)
    assert network(x, sound).shape == (2, 1)
    assert not torch.allclose(network(x, sound), network(x, 0.5 * sound))
    assert (network.audio_head(torch.zeros_like(sound)) == 0).all(), "a missing sound is zeros, whatever was learned"
    some = network.audio_head(torch.stack([sound[0], torch.zeros_like(sound[0])]))
    assert some[0].abs().max() > 0
    assert (some[1] == 0).all()


def test_the_mask_head_speaks_in_training_alone() -> None:
    network = make_network(ModelSettings(mask_head=True), 0)
    logits, cells = network.train()(torch.rand(2, 3, 144, 144))
    assert (logits.shape, cells.shape) == ((2, 1), (2, 1, 9, 9))
    assert network.eval()(torch.rand(2, 3, 144, 144)).shape == (2, 1)


def test_a_frozen_backbone_stays_as_it_is() -> None:
    network = make_network(ModelSettings(backbone="mobilenetv3_small_050", frozen=True, **SMALL), 0).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 1.0)
    network(torch.rand(4, 3, 32, 32)).sum().backward()
    optimiser.step()
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"head.0.weight", "head.0.bias"}


# -- errors ------------------------------------------------------------------------------------------------------------


def test_an_unknown_backbone() -> None:
    with pytest.raises(OptionError, match=r"model\.backbone: timm has no 'xception'; near it: legacy_xception, "):
        Network(ModelSettings(backbone="xception"))


@pytest.mark.parametrize("layer", ["gelu", "linear", "linear:x", "dropout:2"])
def test_an_unknown_layer(layer: str) -> None:
    with pytest.raises(OptionError, match=rf"model\.head: '{layer}' is no layer \(.*\); known are norm, dropout:RATIO"):
        Network(ModelSettings(head=(layer,)))


def test_a_pool_that_a_backbone_does_not_have() -> None:
    with pytest.raises(OptionError, match=r"model\.pool: face_net pools in its own way"):
        Network(ModelSettings(pool="max"))


def test_two_layers_of_relu() -> None:
    with pytest.raises(OptionError, match=r"model\.lstm\.activation relu is for one layer, not 2"):
        Network(clip_settings(lstm=LstmSettings(width=5, layers=2, activation="relu")))


# -- weights -----------------------------------------------------------------------------------------------------------


def test_published_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    real = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: object) -> torch.nn.Module:
        if pretrained:
            raise OSError("Network is unreachable")
        return real(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    settings = ModelSettings(backbone="mobilenetv3_small_050", pretrained=True, **SMALL)
    with pytest.raises(
        WeightsError,
        match=r"model\.pretrained: the weights of mobilenetv3_small_050 cannot be fetched \(OSError: Network is un.*"
        r"set pretrained to the \.safetensors file, or to false to start from scratch",
    ):
        Network(settings)
    Network(settings, fetch=False)  # a checkpoint follows: nothing is fetched


def test_our_own_network_has_no_published_weights() -> None:
    with pytest.raises(
        WeightsError, match=r"there are no published weights of face_net; set it to false, or to a file"
    ):
        Network(ModelSettings(pretrained=True))


def test_weights_from_a_file(tmp_path: Path) -> None:
    import timm

    whole = timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=10)  # with a classifier on top
    path = tmp_path / "weights.safetensors"
    save_file(whole.state_dict(), path)
    network = Network(ModelSettings(backbone="mobilenetv3_small_050", pretrained=str(path), **SMALL))
    for name, value in network.backbone.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    with pytest.raises(
        WeightsError, match=r"weights\.safetensors: .* of another network: \d+ of \d+ tensors are missing"
    ):
        Network(ModelSettings(backbone="resnet18", pretrained=str(path), **SMALL))
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: there is no such file"):
        Network(ModelSettings(backbone="resnet18", pretrained=str(tmp_path / "gone.safetensors"), **SMALL))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_pickle_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    for data in (pickle.dumps(Bomb(tmp_path / "exploded")), b""):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(
            CheckpointError, match=r"no safetensors file \(.*\); pickled weights .* runs code: convert them"
        ):
            read_tensors(tmp_path / name)
    torch.save({"bomb": Bomb(tmp_path / "exploded")}, tmp_path / name)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        Network(ModelSettings(backbone="resnet18", pretrained=str(tmp_path / name), **SMALL))
    assert not (tmp_path / "exploded").exists()
