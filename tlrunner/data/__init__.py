"""The data layer: from anyone's images to batches of uint8 pixels.

Reading order, and what each is for:

    world, order            who gets which sample when, as arithmetic
    source, sources         where images come from: folders, listing (CSV, JSONL), foreign (Parquet
                            of others, with tables and column), sample (drawn), places
    decode, formats         what counts as an image, and how its bytes become pixels
    write, shardfile        images kept as Parquet shards; shrink
    manifest, index         what shards hold, and where in them each image lies
    store, s3, fetch        directories and S3 prefixes alike; s3 is the only module that knows S3
    cache                   what a node keeps on its disk for all trials
    shards, dataset         shards opened, near or streamed; prepare makes them where there are none
    augment                 a view of a sample; resize, colour, trivial, mix
    decoded                 images decoded once for all trials of a node
    loader, threads         batches, rendered ahead of time
    normalise               from uint8 to a model's input, by table
"""
