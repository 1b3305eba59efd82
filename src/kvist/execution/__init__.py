"""Carries out the plans of programs: the executor, its servers, and the results that programs wait for.

The executor is one asyncio loop; programs run in threads and coroutines of their own (kvist.lang). Decisions are those
of kvist.planning.
"""
