"""The counters of the scheduler."""

from __future__ import annotations

from kvist.counter import Counter, CounterGroup

SCHEDULER_COUNTERS = CounterGroup(
    owner="scheduler",
    section="Workers, by their own reports",
    counters=(
        Counter(name="steps", unit="steps", text="engine steps finished"),
        Counter(name="prompt_tokens", unit="tokens", text="prompt tokens of admitted requests"),
        Counter(
            name="cached_prompt_tokens",
            unit="tokens",
            text="prompt tokens of admitted requests that were found in the page cache",
        ),
        Counter(
            name="ceiling_prompt_tokens",
            unit="tokens",
            text="prompt tokens that would have been cached if no page had ever been evicted",
        ),
        Counter(
            name="computed_prompt_tokens",
            unit="tokens",
            text="prompt tokens computed by the model, recomputed ones included",
        ),
        Counter(
            name="prompt_step_tokens", unit="tokens", text="prompt tokens computed in the steps of prompt_step_seconds"
        ),
        Counter(
            name="prompt_step_seconds",
            unit="seconds",
            text="total time of steps that computed prompt tokens, the decodes in them included",
        ),
        Counter(name="decode_steps", unit="steps", text="steps without prompt tokens"),
        Counter(name="decode_step_seconds", unit="seconds", text="total time of steps without prompt tokens"),
        Counter(
            name="shared_prefix_waits",
            unit="requests",
            text="times that a request waited for pages that another running request was computing",
        ),
        Counter(name="generation_tokens", unit="tokens", text="output tokens produced"),
        Counter(
            name="preemptions",
            unit="requests",
            text="running requests preempted because no free page was left, or for a claim",
        ),
        Counter(
            name="claims",
            unit="requests",
            text="requests preempted for a waiting one, of a lower `priority` value or of a key with fewer places",
        ),
        Counter(
            name="grammar_wait_seconds",
            unit="seconds",
            text="total time for which requests have waited for the grammar of their constraint",
        ),
        Counter(name="requests_finished", unit="requests", text="requests that ended with all their tokens"),
        Counter(name="requests_failed", unit="requests", text="requests that ended with an error"),
        Counter(name="requests_aborted", unit="requests", text="requests aborted by their gateway"),
        Counter(
            name="requests_refused",
            unit="requests",
            text="requests refused because the queue was full or the request was invalid",
        ),
        Counter(
            name="requests_displaced",
            unit="requests",
            text="waiting requests removed from a full queue in favour of a caller with fewer requests in it",
        ),
        Counter(name="leases_granted", unit="leases", text="leases of prompts that this worker has granted"),
        Counter(
            name="leases_refused",
            unit="leases",
            text="leases refused because the leases of all clients, or of this one, hold as many pages as they may",
        ),
        Counter(name="leases_renewed", unit="leases", text="times that a client has renewed a lease"),
        Counter(name="leases_expired", unit="leases", text="leases that ended because their time was over"),
        Counter(
            name="leases_given_up",
            unit="leases",
            text="leases that ended early because a request could not go on without their pages",
        ),
        Counter(
            name="handoffs_sent",
            unit="handoffs",
            text="handoffs sent by this prefill worker and acknowledged by the decode worker",
        ),
        Counter(name="handoffs_received", unit="handoffs", text="handoffs granted and verified by this decode worker"),
        Counter(
            name="handoff_checksum_mismatches",
            unit="handoffs",
            text="handoffs whose pages arrived changed at this decode worker, which computed the pages again",
        ),
        Counter(name="handoffs_failed", unit="handoffs", text="handoffs that failed, were refused or timed out"),
        Counter(
            name="handoffs_cancelled",
            unit="handoffs",
            text="handoffs cancelled because the request was aborted: its client or gateway had disconnected",
        ),
        Counter(
            name="foreign_grants",
            unit="grants",
            text="grants refused because the gateway had named another decode worker",
        ),
        Counter(name="handoff_pages", unit="pages", text="pages written by handoffs"),
        Counter(name="handoff_bytes", unit="bytes", text="bytes written by handoffs"),
        Counter(
            name="handoff_seconds",
            unit="seconds",
            text="total time of handoffs, from the Grant to the Ack (sent) or to verified pages (received)",
        ),
        Counter(
            name="handoff_grant_wait_seconds",
            unit="seconds",
            text="second tokens: total wait for a Grant after the first token (prefill)",
        ),
        Counter(
            name="handoff_last_copy_seconds",
            unit="seconds",
            text="second tokens: total time from the last computed page to the last written page (prefill)",
        ),
        Counter(
            name="handoff_verify_seconds",
            unit="seconds",
            text="second tokens: total time from the arrival of Done to verified pages (decode)",
        ),
        Counter(
            name="handoff_admission_seconds",
            unit="seconds",
            text="second tokens: total time from verified or loaded pages to the step of the second token (decode)",
        ),
        Counter(
            name="handoff_first_step_seconds",
            unit="seconds",
            text="second tokens: total time of the steps that sampled them (decode)",
        ),
        Counter(
            name="store_handoffs_sent",
            unit="handoffs",
            text="prompts whose full pages this prefill worker has stored for a decode worker",
        ),
        Counter(
            name="store_handoffs_incomplete",
            unit="handoffs",
            text="prompts of which this prefill worker could not store all full pages in time for a decode worker",
        ),
        Counter(
            name="store_handoff_seconds",
            unit="seconds",
            text="total time that decode workers waited for pages to be stored here, from the first token on",
        ),
        Counter(
            name="store_handoffs_received",
            unit="handoffs",
            text="requests that this worker continued with pages that a prefill worker had stored for them",
        ),
        Counter(
            name="store_handoff_missing_pages",
            unit="pages",
            text="full pages of these requests that were in no tier and were computed here",
        ),
        Counter(
            name="prefetches",
            unit="requests",
            text="requests that fetched pages from the storage tier, or waited for a fetch of another request",
        ),
        Counter(
            name="prefetch_timeouts",
            unit="requests",
            text="requests that stopped waiting for the storage tier before all their pages were fetched",
        ),
        Counter(
            name="prefetch_wait_seconds",
            unit="seconds",
            text="total time that requests waited for the storage tier, from arrival to the queue",
        ),
    ),
)
