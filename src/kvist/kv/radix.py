"""The radix tree over cached pages: an edge is one page of tokens, a node is the page that holds their K/V.

Pins. A `Pin` keeps the path from the root to the deepest page of one request. At each node of the path, a pin either
*reads* the node's page or has a *duplicate*: a page of its own with the same tokens, computed while another request's
page was already in the tree. When the last reader of a node is gone and a duplicate remains, the node takes over the
duplicate and releases its old page. A path pinned by one request alone therefore costs exactly that request's pages,
and every node on a pinned path has a reader.

Eviction takes the least recently used leaf that is not pinned. No heap is needed: a node enters the queue `_idle` when
it becomes unpinned, the deepest node of a path first, and a node is never unpinned while a descendant is pinned. All
descendants of a node are therefore ahead of it in the queue, and the head is always a leaf: the leaf that has been
unpinned for longest. The order is the order of calls; no clock is read.

With `write_back` (tiers/write_policy.py) eviction takes from a second queue first: `_prepared`, the pages that the host
tier has or cannot get. A page enters the queue from the head of `_idle`, or when the pin for its backup ends, in either
case behind all of its descendants. A hit removes the page from the queue.

Each cache salt has its own root, which is dropped with its last page. The tree keeps page ids, and returns which pages
it took and released (`OwnershipChange`); the ledger (pages.py) keeps the states of pages.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kvist.kv.changes import PageChanges
from kvist.kv.keys import chain_digest, root_digest


class Node:
    """A prefix: empty (`Root`) or of at least one page (`PageNode`)."""

    __slots__ = ("children", "digest", "num_readers")

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.children: dict[bytes, PageNode] = {}  # by the tokens of the next page
        self.num_readers = 1  # the pin that creates the node


class Root(Node):
    __slots__ = ("cache_salt",)

    def __init__(self, digest: bytes, cache_salt: str) -> None:
        super().__init__(digest)
        self.cache_salt = cache_salt


class PageNode(Node):
    __slots__ = ("duplicates", "key", "num_hits", "page_id", "parent", "row")

    def __init__(self, parent: Node, key: bytes, page_id: int) -> None:
        super().__init__(chain_digest(parent.digest, key))
        self.parent = parent
        self.key = key
        self.page_id = page_id
        self.duplicates: list[Pin] | None = None  # the pins that have a page of their own for this prefix
        self.row = 0  # in the list of all pages (changes.py)
        self.num_hits = 0  # requests that matched this page; counted by cache.py, reset by `write_back`


@dataclass(slots=True, eq=False)
class Pin:
    """One request's pin on a path. Mutable; its one owner is the tree."""

    node: Node  # the deepest node of the path
    page_ids: list[int]  # the pages of the path when the pin was made, in prefix order
    num_pages: int  # depth of `node`
    duplicates: dict[PageNode, int] = field(default_factory=dict)  # the request's own page for a node of the path


@dataclass(slots=True, eq=False)
class OwnershipChange:
    """Pages that a call moved into the tree (`taken`) and out of it (`released`)."""

    taken: list[int] = field(default_factory=list)
    released: list[int] = field(default_factory=list)


class RadixTree:
    """The cached prefixes of all salts. Mutable; its one owner is `PageCache`."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._roots: dict[str, Root] = {}
        self._idle: OrderedDict[PageNode, None] = OrderedDict()  # unpinned nodes, the next to evict first
        self._prepared: OrderedDict[PageNode, None] = OrderedDict()  # unpinned nodes, evicted before those of `_idle`
        self.changes = PageChanges("device")

    @property
    def num_evictable(self) -> int:
        return len(self._prepared) + len(self._idle)

    @property
    def num_prepared(self) -> int:
        return len(self._prepared)

    def match(self, keys: Iterable[bytes], cache_salt: str) -> list[PageNode]:
        """Return the nodes of the longest cached prefix of `keys`."""
        path: list[PageNode] = []
        node: Node | None = self._roots.get(cache_salt)
        if node is not None:
            for key in keys:
                node = node.children.get(key)
                if node is None:
                    break
                path.append(node)
        return path

    def pin(self, keys: Iterable[bytes], cache_salt: str) -> Pin:
        """Pin the longest cached prefix of `keys`, which may be empty."""
        path = self.match(keys, cache_salt)
        root = self._roots.get(cache_salt)
        if root is None:
            root = self._roots[cache_salt] = Root(root_digest(self._namespace, cache_salt), cache_salt)
        else:
            root.num_readers += 1
        for node in path:
            self._read(node)
        return Pin(path[-1] if path else root, [node.page_id for node in path], len(path))

    def pin_path(self, leaf: PageNode) -> tuple[Pin, int]:
        """Pin the path to a page. Return the pin, and the number of pages on the path that were unpinned before."""
        path, num_unused = list[PageNode](), 0
        node: Node = leaf
        while isinstance(node, PageNode):
            num_unused += self._read(node)
            path.append(node)
            node = node.parent
        node.num_readers += 1
        return Pin(leaf, [each.page_id for each in reversed(path)], len(path)), num_unused

    def _read(self, node: PageNode) -> bool:
        """Add a reader; return whether the node had none."""
        node.num_readers += 1
        if node.num_readers > 1:
            return False
        if node in self._prepared:
            del self._prepared[node]
        else:
            del self._idle[node]
        return True

    def extend(self, pin: Pin, keys: Sequence[bytes], page_ids: Sequence[int]) -> OwnershipChange:
        """Extend the pinned path by `keys`; `page_ids` are the request's own pages with the K/V of these tokens.

        The tree takes a page that it lacks. If the tree has the page and another pin reads it, the request keeps its
        own page as a duplicate; if the tree's page is unpinned, the tree takes the request's page and releases its own.
        """
        change = OwnershipChange()
        for key, page_id in zip(keys, page_ids, strict=True):
            parent = pin.node
            node = parent.children.get(key)
            if node is None:
                node = parent.children[key] = PageNode(parent, key, page_id)
                change.taken.append(page_id)
                node.row = self.changes.on_stored(node.digest)
            elif node.num_readers == 0:
                self._read(node)
                change.released.append(node.page_id)
                change.taken.append(page_id)
                node.page_id = page_id
            else:
                pin.duplicates[node] = page_id
                if node.duplicates is None:
                    node.duplicates = []
                node.duplicates.append(pin)
            pin.node = node
            pin.num_pages += 1
        return change

    def unpin(self, pin: Pin, *, prepared: bool = False) -> OwnershipChange:
        """Unpin the whole path, deepest page first. The caller frees the pages that are left in `pin.duplicates`.

        With `prepared`, the unpinned pages are evicted next, except pages with hits (`num_hits`) and their prefixes."""
        change = OwnershipChange()
        node = pin.node
        while isinstance(node, PageNode):
            if pin.duplicates and node in pin.duplicates:
                assert node.duplicates is not None
                node.duplicates.remove(pin)
            else:
                node.num_readers -= 1
                if node.num_readers == 0:
                    if node.duplicates:
                        self._hand_over(node, node.duplicates.pop(), change)  # the newest pin is likely to last longest
                    elif (
                        prepared and not node.num_hits and all(map(self._prepared.__contains__, node.children.values()))
                    ):
                        self._prepared[node] = None
                    else:
                        self._idle[node] = None
            node = node.parent
        assert isinstance(node, Root)
        node.num_readers -= 1
        self._drop_root_if_unused(node)
        return change

    def tail(self, pin: Pin, num_pages: int) -> list[PageNode]:
        """Return the deepest `num_pages` pages of the pin's path, in prefix order."""
        nodes: list[PageNode] = []
        node = pin.node
        for _ in range(num_pages):
            assert isinstance(node, PageNode)
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes

    def oldest_idle(self) -> PageNode | None:
        """Return the page that is evicted first when no prepared page is left."""
        return next(iter(self._idle), None)

    def mark_prepared(self, node: PageNode) -> None:
        """Move an idle page, the `oldest_idle`, to the end of the prepared pages."""
        del self._idle[node]
        self._prepared[node] = None

    def evict(self) -> PageNode:
        """Remove and return the least recently used leaf that is not pinned. At least one page must be evictable."""
        node, _ = (self._prepared or self._idle).popitem(last=False)
        assert not node.children, "a page is evicted before the prefix it continues"
        parent = node.parent
        del parent.children[node.key]
        self.changes.on_removed(node.digest, node.row)
        if isinstance(parent, Root):
            self._drop_root_if_unused(parent)
        return node

    def nodes(self) -> Iterator[PageNode]:
        """Yield every page of the tree, parents before children."""
        stack: list[Node] = list(self._roots.values())
        while stack:
            for child in stack.pop().children.values():
                yield child
                stack.append(child)

    def _hand_over(self, node: PageNode, successor: Pin, change: OwnershipChange) -> None:
        """Replace the page of a node without readers by the duplicate of `successor`, which becomes its reader."""
        change.released.append(node.page_id)
        node.page_id = successor.duplicates.pop(node)
        change.taken.append(node.page_id)
        node.num_readers = 1

    def _drop_root_if_unused(self, root: Root) -> None:
        # Clients may send any number of salts: a root must not outlive its pages.
        if not root.children and root.num_readers == 0:
            del self._roots[root.cache_salt]
