import pytest

from fastmoe.config import ModelConfig
from fastmoe.nn import Transformer
from fastmoe.scale import PRESETS, from_config, preset

EXPERT_PARAMS = {
    "fmoe-bench": 536870912,
    "shazeer-137b": 137438953472,
    "gshard-600b": 618475290624,
    "switch-base-128": 7247757312,
    "switch-c": 1570347417600,
    "switch-xxl-128": 386547056640,
    "st-moe-32b": 241591910400,
    "ec-8b-64e": 137438953472,
    "demix-s": 452984832,
    "demix-m": 1610612736,
    "demix-l": 3623878656,
    "demix-xl": 6442450944,
    "m6t-base": 1342177280,
    "m6t-10b": 10737418240,
    "m6t-100b": 103079215104,
    "m6t-1t": 1002606428160,
    "m6-10t": 10050223472640,
    "megablocks-760m": 28991029248,
    "mixtral-8x7b": 45097156608,
    "olmoe": 6442450944,
    "qwen3-30b-a3b": 28991029248,
    "qwen3-235b-a22b": 227096395776,
    "dsv2-lite": 14844690432,
    "dsv2": 225501511680,
    "dsv3": 656463101952,
}
TOTALS = {  # as printed, so right to half of the last digit
    "switch-base-128": "7.415",
    "switch-c": "1571.3",
    "switch-xxl-128": "394.7",
    "st-moe-32b": "269.7",
    "ec-8b-64e": "142.8",
    "demix-s": "0.520",
    "demix-m": "1.763",
    "demix-l": "3.928",
    "demix-xl": "6.948",
    "mixtral-8x7b": "46.703",
    "olmoe": "6.919",
    "qwen3-30b-a3b": "30.532",
    "qwen3-235b-a22b": "235.093",
    "dsv2-lite": "15.706",
    "dsv2": "235.741",
    "dsv3": "671.025",
}
DENSE = {
    "glm-10b": 9663676416,
    "cogview-4b": 3774873600,
    "pangu-2.6b": 2516582400,
    "pangu-13b": 12582912000,
    "pangu-200b": 206158430208,
    "gpt3-175b": 173946175488,
    "mtnlg-530b": 528482304000,
}
PUBLISHED = {  # 1e9 parameters
    "shazeer-137b": 137,
    "switch-base-128": 7.4,
    "switch-c": 1571,
    "switch-xxl-128": 395,
    "st-moe-32b": 269,
    "ec-8b-64e": 143,
    "demix-s": 0.52,
    "demix-m": 1.76,
    "demix-l": 3.93,
    "demix-xl": 6.95,
    "m6t-1t": 1000,
    "m6-10t": 10000,
    "mixtral-8x7b": 46.7,
    "olmoe": 6.9,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235,
    "dsv2-lite": 15.7,
    "dsv2": 236,
    "dsv3": 671,
}
ACTIVE = {
    "mixtral-8x7b": 12.9,
    "olmoe": 1.3,
    "qwen3-30b-a3b": 3.3,
    "qwen3-235b-a22b": 22,
    "dsv2": 21,
    "dsv3": 37,
    "m6-10t": 78.5,
}


def test_every_row_is_here():
    assert PRESETS.keys() == EXPERT_PARAMS.keys() | DENSE.keys()


@pytest.mark.parametrize("name", EXPERT_PARAMS)
def test_expert_params_are_exact(name):
    assert preset(name).expert_params == EXPERT_PARAMS[name]


@pytest.mark.parametrize("name", DENSE)
def test_dense_models_have_12_l_d_squared(name):
    row = preset(name)
    assert (row.expert_params, row.total_params) == (0, DENSE[name])


@pytest.mark.parametrize("name", TOTALS)
def test_totals_are_the_printed_ones(name):
    digits = len(TOTALS[name].partition(".")[2])
    assert f"{preset(name).total_params / 1e9:.{digits}f}" == TOTALS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_within_one_percent_of_the_published(name):
    row = preset(name)
    assert row.published == PUBLISHED[name] * 1e9
    assert row.total_params == pytest.approx(row.published, rel=0.01)


@pytest.mark.parametrize("name", ACTIVE)
def test_active_params(name):
    assert preset(name).active_params / 1e9 == pytest.approx(ACTIVE[name], rel=0.02)


def test_only_what_the_authors_state_is_published():
    assert {row.name for row in PRESETS.values() if row.published} == PUBLISHED.keys()


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(tie_embeddings=True, num_shared_experts=2, num_kv_heads=2, num_dense_layers=1),
        dict(activation="relu2", num_shared_experts=1, num_dense_layers=1),
        dict(activation="clamped_swiglu", bias=True, num_dense_layers=1),
    ],
)
def test_a_config_counts_what_the_model_holds(options):
    config = ModelConfig(d_model=32, num_layers=3, num_experts=4, d_ff=24, d_ff_dense=40, **options)
    held = sum(parameter.numel() for parameter in Transformer(config).matrices().values())
    assert from_config(config).total_params == held


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="fastmoe.preset: name .* got 'mixtral-8x7'; did you mean mixtral-8x7b"):
        preset("mixtral-8x7")
