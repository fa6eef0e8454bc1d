"""What a GGUF's header says, and files that are none."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from harness.engines.gguf import BLOCKS, describe, read_header, sha256, tensor_bytes
from harness.errors import BadInputError, HarnessError, NotFoundError
from harness.model.record import Tensors
from tests.support.gguf_file import TINY, write_gguf


def test_a_header_names_the_model(tmp_path: Path) -> None:
    model = describe(read_header(write_gguf(tmp_path / "m.gguf", train_context=2048)), "m", None)
    assert (model.architecture, model.train_context, model.layers, model.quantization) == ("llama", 2048, 2, "F32")


def test_tied_embeddings_count_as_the_output_too(tmp_path: Path) -> None:
    found = tensor_bytes(read_header(write_gguf(tmp_path / "m.gguf")))
    assert found == Tensors(layer_bytes=(384, 640), output_bytes=2560 + 32, embedding_bytes=2560)


def test_an_output_matrix_of_its_own_is_not_the_embeddings(tmp_path: Path) -> None:
    tensors = (*TINY, ("output.weight", 320))
    found = tensor_bytes(read_header(write_gguf(tmp_path / "m.gguf", tensors=tensors)))
    assert (found.embedding_bytes, found.output_bytes) == (2560, 1280 + 32)


def test_experts_are_counted_in_their_layer(tmp_path: Path) -> None:
    tensors = (*TINY, ("blk.1.ffn_up_exps.weight", 1600))
    found = tensor_bytes(read_header(write_gguf(tmp_path / "m.gguf", tensors=tensors)))
    assert found.layer_bytes == (384, 640 + 6400)
    assert found.expert_bytes == (0, 6400)


def test_block_sizes_are_ggml_s() -> None:
    from gguf.constants import GGML_QUANT_SIZES

    theirs = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
    assert {kind: theirs[kind] for kind in BLOCKS} == BLOCKS


def test_a_file_cut_anywhere_is_truncated(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(4, len(whole), 13):
        cut.write_bytes(whole[:length])
        with pytest.raises(BadInputError) as caught:
            read_header(cut)
        assert caught.value.code == "truncated-gguf", length


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04",
        b"GGUF\x01\0\0\0" + b"\0" * 16,
        b"GGUF\x00\0\0\x03" + b"\0" * 16,
        b"GGUF\x03\0\0\0" + b"\xff" * 16,
        b"GGUF\x03\0\0\0" + b"\0" * 8 + b"\x01" + b"\0" * 7 + b"\xff" * 40,
    ],
)
def test_what_is_no_gguf_is_bad_input(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(BadInputError):
        read_header(path)


def test_no_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_header(tmp_path / "none.gguf")
    with pytest.raises(HarnessError, match="folder"):
        read_header(tmp_path)


def test_the_digest_is_the_file_s_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def fields(*made: tuple[str, int, bytes], tensors: int = 1) -> bytes:
    """A header with these fields (name, kind, value), and tensors of one element."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(made))
    head += b"".join(text(name) + struct.pack("<I", kind) + value for name, kind, value in made)
    head += b"".join(text(f"t{number}") + struct.pack("<IQIQ", 1, 8, 0, 0) for number in range(tensors))
    return head + b"\0" * 4096


LLAMA = ("general.architecture", 8, struct.pack("<Q", 5) + b"llama")


@pytest.mark.parametrize(
    "data",
    [
        fields(LLAMA, tensors=0),
        *(fields(LLAMA, ("llama.context_length", 4, struct.pack("<I", value))) for value in (0, (1 << 32) - 1)),
        fields(LLAMA, ("llama.context_length", 5, struct.pack("<i", -5))),
        fields(LLAMA, ("llama.context_length", 10, struct.pack("<Q", (1 << 64) - 1))),
        fields(LLAMA, ("llama.context_length", 6, struct.pack("<f", float("nan")))),
        fields(LLAMA, ("llama.context_length", 9, struct.pack("<IQI", 4, 1, 8192))),
        fields(LLAMA, ("llama.context_length", 8, struct.pack("<Q", 4) + b"8192")),
        fields(LLAMA, ("llama.block_count", 4, struct.pack("<I", 1 << 31))),
        fields(LLAMA, ("llama.embedding_length", 7, b"\1")),
        *(fields(("general.alignment", 4, struct.pack("<I", value))) for value in (0, 3, 1 << 31)),
        fields(("general.alignment", 9, struct.pack("<IQI", 4, 1, 32))),
        fields(("general.alignment", 6, struct.pack("<f", float("nan")))),
        fields(("general.architecture", 8, struct.pack("<Q", 3) + b"a\nb")),
        fields(("general.architecture", 4, struct.pack("<I", 1))),
        fields(LLAMA, LLAMA),
        fields(("", 4, struct.pack("<I", 1))),
        fields(("x", 9, struct.pack("<IQ", 4, 1 << 21))),
        b"GGUF" + struct.pack("<IQQ", 3, 1, 1 << 20) + b"\0" * 4096,
    ],
)
def test_fields_that_are_not_what_they_must_be_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(BadInputError):
        read_header(path)


def test_zeros_without_end_are_refused_at_once(tmp_path: Path) -> None:
    """A file of holes: 64 GiB of zeros take no room, and none of them is read."""
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 1 << 17, 1 << 14))
        file.truncate(64 << 30)
    with pytest.raises(BadInputError):
        read_header(path)


def test_a_pipe_is_no_model(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(BadInputError, match="no plain file"):
        read_header(tmp_path / "m.gguf")


def test_a_block_of_five_thousand_digits_is_no_layer(tmp_path: Path) -> None:
    tensors = (*TINY, (f"blk.{'9' * 5000}.attn_q.weight", 96))
    assert len(tensor_bytes(read_header(write_gguf(tmp_path / "m.gguf", tensors=tensors))).layer_bytes) == 2
