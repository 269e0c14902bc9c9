"""The contract's promises to its readers."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor import FieldDescriptor, ServiceDescriptor

from meshlm.chassis.errors import STATUS, Reason
from meshlm.v1 import cache_pb2, generation_pb2, guard_pb2, inference_pb2, worker_pb2

FILES = (generation_pb2, inference_pb2, worker_pb2, guard_pb2, cache_pb2)


def services() -> list[ServiceDescriptor]:
    return [s for file in FILES for s in file.DESCRIPTOR.services_by_name.values()]


def test_enums_start_with_unspecified() -> None:
    for file in FILES:
        for name, enum in file.DESCRIPTOR.enum_types_by_name.items():
            assert enum.values[0].number == 0, name
            assert enum.values[0].name.endswith("_UNSPECIFIED"), name


def test_every_sampling_field_whose_zero_means_something_can_be_unset() -> None:
    """`ignore_eos` is off at zero; lists and maps are empty; all else must tell zero from unset."""
    for field in generation_pb2.Sampling.DESCRIPTOR.fields:
        if field.name == "ignore_eos" or field.is_repeated:
            continue
        assert field.has_presence, field.name
        assert field.type != FieldDescriptor.TYPE_MESSAGE


def test_streams_carry_usage_in_every_message() -> None:
    for message in (inference_pb2.StreamGenerateResponse, worker_pb2.RunGenerationResponse):
        field = message.DESCRIPTOR.fields_by_name["usage"]
        assert field.containing_oneof is None
        assert field.message_type.full_name == "meshlm.v1.Usage"


@pytest.mark.parametrize("service", services(), ids=lambda s: s.name)
def test_request_and_response_belong_to_one_rpc_each(service: ServiceDescriptor) -> None:
    types = [t.name for method in service.methods for t in (method.input_type, method.output_type)]
    assert len(set(types)) == len(types)


def test_every_reason_has_a_status_and_is_documented() -> None:
    from pathlib import Path

    text = (Path(__file__).resolve().parents[2] / "docs/errors.md").read_text()
    assert set(STATUS) == set(Reason)
    for reason, status in STATUS.items():
        assert any(f"`{reason}`" in line and status.name in line for line in text.splitlines()), reason
