"""Data sets of images, seen/unseen splits, tables of latents, writers, and the procedural data set ``flora``.

Import from the file that owns the name: ``images`` (one file to pixels), ``folders`` (a folder to an ``ImageSet``),
``sources`` (archives, shards and data set objects, opened like a folder), ``pixel_cache`` (decoded images mapped from a
file), ``sampling`` (which images a training step sees), ``splits`` (seen and unseen
categories, shots), ``latent_table`` (W+ codes of a data set), ``writers`` (files that are whole or absent). Importing this
package imports none of them.
"""
