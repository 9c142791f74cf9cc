"""Speed, loading time and memory of a shared model beside the dense one."""
