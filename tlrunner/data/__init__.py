"""The data layer: from anyone's images to batches of uint8 pixels.

Reading order: `world` and `order` (who gets which sample when, as arithmetic), `sources` and
`sample` (where images come from), `decode` (what counts as an image), `write`, `manifest` and
`index` (images kept as Parquet shards), `dataset` and `prepare` (shards opened, or made when they
are missing), `augment`, `colour`, `trivial` and `mix` (a view of a sample), `loader` (batches).
`store` fetches single files, such as weights, and is the only module that knows S3.
"""
