"""Optional adapter: this project's losses inside NeMo-Aligner's PPO actor. See README.md in this folder."""
