"""The decoders of data sets and of samples, which turn latents into images."""

from __future__ import annotations

from mlem.cli.schema import Data, Sample
from mlem.data import decoder_of
from mlem.decoder import Decoder
from mlem.family import Family
from mlem.level import Level

__all__ = ["data_decoder", "decoder_for"]


def data_decoder(data: Data) -> Decoder | None:
    """The decoder of a data set of latents; None for images."""
    return decoder_of(data.source, data.folder, **data.options)


def decoder_for(job: Sample, model: Family | Level) -> Decoder | None:
    """The decoder of samples that are latents: the family's, or for a level that of its data.

    Raises: ValueError if there is none, or it differs from that of the data.
    """
    level = model.level() if isinstance(model, Family) else model
    found = model.decoder if isinstance(model, Family) else None
    if found is None and not level.latents:
        return None
    of_data = data_decoder(job.data)
    if not isinstance(model, Family):
        found = of_data
    if found is None:
        remedy = "save it with one, family.decoder = Decoder(FOLDER of an AutoencoderKL)"
        if not isinstance(model, Family):
            remedy = "name its data set of latents with data="
        kind = "the family" if isinstance(model, Family) else f"level {model.name}"
        raise ValueError(f"{kind} makes latents and has no decoder: {remedy}")
    if of_data is not None and found.fingerprint != of_data.fingerprint:
        raise ValueError(
            f"the family has decoder {found.fingerprint} and data={job.data.name} was encoded by "
            f"{of_data.fingerprint}: name the data set that the family was trained on"
        )
    return found
