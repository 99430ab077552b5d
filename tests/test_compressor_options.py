"""Neural Compressor's Python: what it is given, and what is refused."""

from __future__ import annotations

import pytest
import torch
from compressing import config, scripted, token_ids, weight
from conftest import tiny

from qllm import AccuracyCriterion, TuningCriterion, quantization
from qllm.errors import UserError
from qllm.neural_compressor.model import read_samples

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("batches", "word"),
    [
        ([], "no sample"),
        (["text"], "str"),
        ([{"ids": 1}], "dict"),
        ([torch.rand(2, 3)], "Tensor"),
        ([{"input_ids": [torch.ones(2).long()]}], "dict"),
        ([torch.tensor([[1, 4096]])], "4096"),
        ([torch.tensor([[1, -1]])], "-1"),
    ],
)
def test_samples_that_cannot_be(batches, word):
    with pytest.raises(UserError, match=word):
        read_samples(batches, 2, 10, 4096, full=False)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"approach": "static"}, "weight_only"),
        ({"approach": "dynamic"}, "8:tc"),
        ({"backend": "ipex"}, "default"),
        ({"device": "xpu"}, "cpu"),
        ({"domain": "cv"}, "nlp"),
        ({"quant_format": "QDQ"}, "default"),
        ({"inputs": ["x"]}, "empty"),
        ({"reduce_range": True}, "reduce_range"),
        ({"excluded_precisions": ["int8"]}, "bf16"),
        ({"quant_level": 0}, "auto"),
        ({"diagnosis": True}, "False"),
        ({"ni_workload_name": "mine"}, "quantization"),
        ({"calibration_sampling_size": [100, 200]}, "one whole number"),
        ({"accuracy_criterion": 0.01}, "AccuracyCriterion"),
        ({"tuning_criterion": None}, "TuningCriterion"),
        ({"op_type_dict": []}, "dict"),
        ({"recipes": {"smooth_quant": True}}, "False"),
        ({"recipes": {"smooth_quant_args": {"alpha": 0.5}}}, "smooth_quant_args"),
        ({"recipes": {"teq_args": {"folding": True}}}, "teq_args"),
        ({"recipes": {"gptq": {}}}, "gptq_args"),
        ({"recipes": {"gptq_args": {"damp": 0.01}}}, "percdamp"),
        ({"recipes": {"gptq_args": {"percdamp": -1}}}, "number"),
        ({"recipes": {"gptq_args": {"block_size": True}}}, "whole number"),
        ({"recipes": {"gptq_args": {"act_order": 1}}}, "True or False"),
        ({"recipes": {"awq_args": {"enable_auto_scale": False}}}, "True"),
        ({"recipes": {"rtn_args": {"return_int": True}}}, "False"),
        ({"recipes": {"gptq_args": 3}}, "dict"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, word):
    with pytest.raises(UserError, match=word) as caught:
        config(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "default", "domain": "nlp", "device": "cpu", "quant_level": 1},
        {"example_inputs": torch.ones(1), "excluded_precisions": ["bf16"], "inputs": []},
        {"calibration_sampling_size": [100], "reduce_range": None},
        {"recipes": {"smooth_quant": False, "layer_wise_quant": True, "gptq_args": {}}},
        {"recipes": {"rtn_args": {"enable_full_range": False, "enable_mse_search": False}}},
        {"tuning_criterion": TuningCriterion("basic", None, 0, 10, ["performance"])},
    ],
)
def test_options_that_mean_what_happens_anyway_are_taken(options):
    config(**options)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: AccuracyCriterion(criterion="best"), "relative"),
        (lambda: AccuracyCriterion(tolerable_loss="1%"), "number"),
        (lambda: TuningCriterion(strategy="bayesian"), "basic"),
        (lambda: TuningCriterion(max_trials=0), "whole number"),
        (lambda: TuningCriterion(timeout=-1), "from 0 on"),
        (lambda: TuningCriterion(objective="modelsize"), "performance"),
    ],
)
def test_criteria_that_cannot_be(make, word):
    with pytest.raises(UserError, match=word):
        make()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"op_type_dict": weight(algorithm="TEQ")}, "teq"),
        ({"op_type_dict": weight(dtype="nf4")}, "nf4"),
        ({"op_type_dict": weight(bits=9)}, "9"),
        ({"op_type_dict": weight(bits=[])}, "empty list"),
        ({"op_type_dict": weight(granularity="per_channel")}, "granularity"),
        ({"op_type_dict": {"Conv2d": {"weight": {"bits": 4}}}}, "Linear"),
        ({"op_type_dict": {".*": {"bits": 4}}}, "weight"),
        ({"op_type_dict": {".*": {"activation": {"dtype": "int8"}}}}, "activation"),
        ({"op_type_dict": weight(dtype="fp32")}, "as it is"),
        ({"op_name_dict": {"model.x": {"weight": {"bits": 8}}}}, "matches no layer"),
        ({"op_type_dict": weight(algorithm="GPTQ")}, "calib_dataloader"),
        ({"op_type_dict": weight(algorithm=["RTN", "AWQ"])}, "AWQ needs calibration"),
        (
            {
                "op_name_dict": {".*fc1": {"weight": {"algorithm": "GPTQ"}}},
                "recipes": {"rtn_args": {"enable_mse_search": True}},
                "calibration": True,
            },
            "enable_mse_search",
        ),
        (
            {
                "op_type_dict": weight(algorithm="GPTQ"),
                "recipes": {"gptq_args": {"pad_max_length": 4096}},
                "calibration": True,
            },
            "window of 512",
        ),
    ],
)
def test_configurations_that_no_model_can_have(options, word):
    calibration = [token_ids()] if options.pop("calibration", False) else None
    with pytest.raises(UserError, match=word) as caught:
        quantization.fit(tiny("opt"), config(**options), calibration)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"calib_func": print}, "calib_dataloader"),
        ({"eval_dataloader": []}, "eval_func"),
        ({"eval_metric": {"topk": 1}}, "eval_func"),
        ({"eval_func": 3}, "function"),
        ({"eval_func": scripted([1, 2])}, "one number"),
        ({"eval_func": scripted(float("inf"))}, "inf"),
        ({"model": "no/such/folder"}, "no folder"),
        ({"model": torch.nn.Linear(2, 2)}, "Linear"),
        ({"conf": {"approach": "weight_only"}}, "PostTrainingQuantConfig"),
    ],
)
def test_arguments_that_cannot_be(arguments, word):
    with pytest.raises(UserError, match=word):
        quantization.fit(**{"model": tiny("opt"), "conf": config()} | arguments)


def test_a_quantized_folder_is_refused(tmp_path):
    quantization.fit(tiny("opt"), config()).save(tmp_path / "out")
    with pytest.raises(UserError, match="quantized already"):
        quantization.fit(tmp_path / "out", config())


def test_the_package_has_no_other_names():
    import qllm

    assert not hasattr(qllm, "PruningConfig")
    with pytest.raises(ImportError):
        from qllm import QuantizationAwareTrainingConfig  # noqa: F401
