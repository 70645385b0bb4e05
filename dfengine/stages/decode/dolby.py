"""Dolby Vision: whether a video can be read without Dolby's own metadata.

FFmpeg gives the base layer. Mostly that is HDR10, HLG or SDR; where it has Dolby's own colours, skin would be purple.
"""

from __future__ import annotations

import re

from dfengine.stages.decode.first_bytes import read_index
from dfengine.types import PathLikeStr

# The configuration record (Dolby Vision Streams Within the ISO Base Media File Format 2.4, 2.2): two bytes of version,
# 7 bits of profile, 9 of level and layers, 4 of what the base layer is compatible with. In Matroska it is the extra
# data (id 0x41ED) of a BlockAdditionMapping (RFC 9559) whose type (0x41E7) is the name of the box.
_RECORD = re.compile(rb"dv[cvw]C(?:\x41\xed[\x80-\xff])?([\x01-\x0f].{4})", re.DOTALL)
_MATROSKA_HEADERS = 1 << 20  # tracks come before the first cluster, mostly within the first kilobytes


def own_colours(path: PathLikeStr, container: str) -> int:
    """The profile, if there is one and the base layer has Dolby's own colours; else 0.

    ``container``: FFmpeg's name. Only MP4, QuickTime and Matroska are looked into.
    """
    if "mov" in container:
        headers = read_index(path)
    elif "matroska" in container:
        with open(path, "rb") as file:
            headers = file.read(_MATROSKA_HEADERS)
    else:
        return 0
    found = _RECORD.search(headers)
    if found is None:
        return 0
    record = found[1]
    profile, compatible_with = record[2] >> 1, record[4] >> 4
    # 5: HEVC in IPT; 10 and 20: AV1 and stereo HEVC, in IPT if compatible with nothing.
    return profile if profile == 5 or (profile in (10, 20) and compatible_with == 0) else 0
