"""Files in and out: checkpoints, artefacts, Hub ids, inputs and provenance. Knows nothing of methods."""
