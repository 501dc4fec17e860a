"""The main job: what a study is, and how it is run."""
