"""HumanEval through a compressed cache: problems, prompts, completions, and running them within limits."""
