"""Retrofit: train an existing model to fold its cache."""
