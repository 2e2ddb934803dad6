"""Named lists of passes; none holds a lossy pass other than the cast that its name asks for."""

from __future__ import annotations

PRESETS: dict[str, str] = {
    "clean": "clean",
    "fast": "clean,raise_ops,clean,fuse_qkv,pad_align",
    "fast_fp16": "clean,raise_ops,clean,fuse_qkv,pad_align,cast_fp16",
}
"""``@name`` in a spec to the passes that it stands for."""
