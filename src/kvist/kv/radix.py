"""The radix tree over cached pages: an edge is one page of tokens, a node is the page that holds their K/V.

Who uses what. A `Pin` is one request's hold on the path from the root to the deepest page it has reached. A pin either
*reads* a node's page or holds a *duplicate* of it: it had computed the same tokens into a page of its own when another
request's page was already there. When the last reader of a node leaves and a duplicate remains, the node takes over
the duplicate and gives up its own page. So a path held by one request alone costs exactly that request's pages, and
every node on a pinned path has a reader.

Eviction takes the least recently used leaf that no pin uses. No heap is needed: nodes join the queue `_idle` as they
become unused, the deepest of a path first. A node is never unused while a descendant is used, so every descendant
stands before it, and the head of the queue is always a leaf and the one unused for longest. Order is the order of
calls; no clock is read.

With `write_back` (cache.py) eviction takes from a second queue first: `_prepared`, the pages that the host tier has or
cannot get. A page enters it from the head of `_idle`, or when the pin for its backup ends, in either case behind all of
its descendants. A hit takes the page out of the queue.

One root per cache salt, dropped when its last page is. The tree names page ids and reports which ones it took and gave
up (`OwnershipChange`); the states of pages are the ledger's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kvist.kv.keys import chain_digest, root_digest


class Node:
    """A prefix: of no page (`Root`) or of at least one (`PageNode`)."""

    __slots__ = ("children", "digest", "num_readers")

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.children: dict[bytes, PageNode] = {}  # by the tokens of the next page
        self.num_readers = 1  # whoever makes a node reads it


class Root(Node):
    __slots__ = ("cache_salt",)

    def __init__(self, digest: bytes, cache_salt: str) -> None:
        super().__init__(digest)
        self.cache_salt = cache_salt


class PageNode(Node):
    __slots__ = ("duplicates", "key", "num_hits", "page_id", "parent")

    def __init__(self, parent: Node, key: bytes, page_id: int) -> None:
        super().__init__(chain_digest(parent.digest, key))
        self.parent = parent
        self.key = key
        self.page_id = page_id
        self.duplicates: list[Pin] | None = None  # the pins that hold a page of their own for this prefix
        self.num_hits = 0  # requests that found it here; counted by who asks (cache.py)


@dataclass(slots=True, eq=False)
class Pin:
    """One request's hold on a path. Mutable; its one owner is the tree."""

    node: Node  # the deepest prefix reached
    page_ids: list[int]  # the tree's pages matched at the start, in order
    num_pages: int  # depth of `node`
    duplicates: dict[PageNode, int] = field(default_factory=dict)  # own page for a node of the path


@dataclass(slots=True, eq=False)
class OwnershipChange:
    """What a call did to pages: `taken` are the tree's from now on, `released` are no longer."""

    taken: list[int] = field(default_factory=list)
    released: list[int] = field(default_factory=list)


class RadixTree:
    """Mutable; its one owner is `PageCache`."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._roots: dict[str, Root] = {}
        self._idle: OrderedDict[PageNode, None] = OrderedDict()  # nodes no pin uses; the next victim first
        self._prepared: OrderedDict[PageNode, None] = OrderedDict()  # the same, and they go before those
        # Digests that came and went since the last `drain_changes`, netted: a digest is in at most one of the two.
        self._added: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

    @property
    def num_evictable(self) -> int:
        return len(self._prepared) + len(self._idle)

    @property
    def num_prepared(self) -> int:
        return len(self._prepared)

    def match(self, keys: Iterable[bytes], cache_salt: str) -> list[PageNode]:
        """The longest path that spells a prefix of `keys`."""
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
        """Pins the longest cached prefix of `keys`, which may be empty."""
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
        """Pins the path to a page; and how many of its pages nobody used."""
        path, num_unused = list[PageNode](), 0
        node: Node = leaf
        while isinstance(node, PageNode):
            num_unused += self._read(node)
            path.append(node)
            node = node.parent
        node.num_readers += 1
        return Pin(leaf, [each.page_id for each in reversed(path)], len(path)), num_unused

    def _read(self, node: PageNode) -> bool:
        """Whether nobody did before."""
        node.num_readers += 1
        if node.num_readers > 1:
            return False
        if node in self._prepared:
            del self._prepared[node]
        else:
            del self._idle[node]
        return True

    def extend(self, pin: Pin, keys: Sequence[bytes], page_ids: Sequence[int]) -> OwnershipChange:
        """OwnershipChange the pin down along `keys`; `page_ids` are the request's own pages with those tokens' K/V.

        A page new to the tree is taken. Where the tree has the page already: in use by others, the request keeps its
        own as a duplicate; unused, the tree takes the request's page and releases its own.
        """
        change = OwnershipChange()
        for key, page_id in zip(keys, page_ids, strict=True):
            parent = pin.node
            node = parent.children.get(key)
            if node is None:
                node = parent.children[key] = PageNode(parent, key, page_id)
                change.taken.append(page_id)
                self._log_added(node.digest)
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
        """Lets go of the whole path, deepest page first. The pin's remaining `duplicates` stay the caller's.

        `prepared`: its pages go next, but for those that were hit (`num_hits`) and what these continue."""
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
                        self._hand_over(node, node.duplicates.pop(), change)  # the newest is likely to stay longest
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
        """The deepest `num_pages` pages of the pin's path, a prefix before what continues it."""
        nodes: list[PageNode] = []
        node = pin.node
        for _ in range(num_pages):
            assert isinstance(node, PageNode)
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes

    def oldest_idle(self) -> PageNode | None:
        """The one that goes after the cold ones."""
        return next(iter(self._idle), None)

    def mark_prepared(self, node: PageNode) -> None:
        """`oldest_idle` becomes the last of the cold ones."""
        del self._idle[node]
        self._prepared[node] = None

    def evict(self) -> PageNode:
        """Removes the least recently used leaf that no pin uses, and returns it. One must be evictable."""
        node, _ = (self._prepared or self._idle).popitem(last=False)
        assert not node.children, "a page is evicted before the prefix it continues"
        parent = node.parent
        del parent.children[node.key]
        self._log_removed(node.digest)
        if isinstance(parent, Root):
            self._drop_root_if_unused(parent)
        return node

    def nodes(self) -> Iterator[PageNode]:
        """Every page of the tree, a prefix before what continues it."""
        stack: list[Node] = list(self._roots.values())
        while stack:
            for child in stack.pop().children.values():
                yield child
                stack.append(child)

    def drain_changes(self) -> tuple[list[bytes], list[bytes]]:
        """Digests (added, removed) since the last call; what came and went in between is in neither."""
        added, removed = list(self._added), list(self._removed)
        self._added.clear()
        self._removed.clear()
        return added, removed

    def _hand_over(self, node: PageNode, heir: Pin, change: OwnershipChange) -> None:
        """The last reader left: the node takes the heir's duplicate, and the heir becomes its reader."""
        change.released.append(node.page_id)
        node.page_id = heir.duplicates.pop(node)
        change.taken.append(node.page_id)
        node.num_readers = 1

    def _drop_root_if_unused(self, root: Root) -> None:
        # Salts come from callers without limit: a root may not outlive its pages.
        if not root.children and root.num_readers == 0:
            del self._roots[root.cache_salt]

    def _log_added(self, digest: bytes) -> None:
        if digest in self._removed:
            del self._removed[digest]
        else:
            self._added[digest] = None

    def _log_removed(self, digest: bytes) -> None:
        if digest in self._added:
            del self._added[digest]
        else:
            self._removed[digest] = None
