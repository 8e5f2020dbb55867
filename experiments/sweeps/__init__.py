"""Many runs over one config: which they are, who runs them, what came out."""
