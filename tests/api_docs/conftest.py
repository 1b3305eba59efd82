from tests.agents_api.conftest import bench

__all__ = ["bench"]
