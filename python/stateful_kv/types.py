"""Types that travel through all rooms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# int32[T], token ids of a text in order.
TokenArray = npt.NDArray[np.int32]

# {"role", "content", ...} as chat templates take it.
Message = Mapping[str, Any]
# What a caller may hand to a turn: the text of a user message, a message, or several.
Messages = str | Message | Sequence[Message]
