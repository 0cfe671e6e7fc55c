import pytest
from torch import nn

from tlrunner.model.stages import Stages, is_norm, module_spans, norm_parameters, stages_of


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Dropout(),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.MaxPool2d(2),
        nn.ModuleDict({"conv": nn.Conv2d(4, 4, 1), "drop": nn.Dropout()}),
        nn.Dropout(),
    )


def test_each_tensor_is_in_the_stage_whose_path_it_is_under():
    stages = stages_of(small_network(), {"stem": ["1.0", "1.1"], "top": ["3"]})
    assert stages.names == ("stem", "top")
    assert stages.of_parameter["1.1.running_mean"] == 0
    assert stages.of_parameter["3.conv.bias"] == 1


def test_a_path_covers_whole_names_only():
    network = nn.ModuleDict({"layer1": nn.Linear(1, 1), "layer10": nn.Linear(1, 1)})
    assert stages_of(network, {"a": ["layer1"], "b": ["layer10"]}).of_parameter["layer10.bias"] == 1


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        ({"stem": ["1"]}, "3.conv.weight is in 0 stages"),
        ({"stem": ["1", "3"], "top": ["3.conv"]}, "3.conv.weight is in 2 stages"),
        ({"stem": ["1"], "middle": ["2"], "top": ["3"]}, r"nothing in the stages \['middle'\]"),
    ],
)
def test_a_tensor_in_no_stage_or_in_two_and_an_empty_stage_are_errors(prefixes, message):
    with pytest.raises(AssertionError, match=message):
        stages_of(small_network(), prefixes)


def test_a_module_without_parameters_belongs_to_the_stage_around_or_before_it():
    network = small_network()
    spans = module_spans(network, stages_of(network, {"stem": ["1"], "top": ["3"]}))
    assert spans[""] == (0, 1)
    assert spans["0"] == (0,), "nothing before it: the first stage"
    assert spans["1.2"] == (0,), "around it"
    assert spans["2"] == (0,), "before it"
    assert spans["3.drop"] == spans["4"] == (1,)


def test_norm_layers_are_known_by_their_own_parameters():
    class NormFreeBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(nn.Linear(1, 1).bias.detach())
            self.conv = nn.Conv2d(1, 1, 1)

    assert is_norm(nn.LayerNorm(2)) and is_norm(nn.BatchNorm2d(2)) and is_norm(nn.GroupNorm(1, 2))
    assert is_norm(nn.BatchNorm2d(2, affine=False)), "its statistics still move"
    assert not is_norm(NormFreeBlock()) and not is_norm(nn.Conv2d(1, 1, 1))
    assert norm_parameters(small_network()) == {"1.1.weight", "1.1.bias"}


def test_stages_compare_by_value():
    assert Stages(("a",), {"w": 0}) == Stages(("a",), {"w": 0})
