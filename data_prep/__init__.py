"""From what people have to what training reads: raw rows → webdataset shards → energon."""

SPLITS = ("train", "val", "test")
