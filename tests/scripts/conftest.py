from pictures import small_pictures  # noqa: F401
from script_runs import quick_look  # noqa: F401
