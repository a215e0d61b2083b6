"""Train sparse mixture-of-experts language models on other people's computers."""
