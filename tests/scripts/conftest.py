from pictures import small_pictures  # noqa: F401
