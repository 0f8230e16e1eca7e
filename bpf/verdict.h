/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* What can happen to a packet or a call, and why: defined here once. The names
 * in metrics, `millrace status` and the documentation are read from this enum's
 * BTF, in lower case and without the prefix. */
#pragma once

enum verdict {
	VERDICT_NOT_A_SERVICE, /* the destination is nobody's Service: untouched */
	VERDICT_FORWARD,       /* sent to a backend */
	VERDICT_REFUSE,        /* refused at once */
	VERDICT_DROP,          /* dropped */
};

enum reason {
	REASON_FORWARDED,      /* a backend was chosen */
	REASON_NO_BACKEND,     /* the Service has no endpoint that serves */
	REASON_UNSETTLED,      /* the Service changed three times during one look-up */
	REASON_FLOW_FORGOTTEN, /* a UDP socket talks to more Services than it has flow places: the oldest gave way */
	REASON_NO_STORAGE,     /* the kernel gave no memory for the flow */
	REASON_FLOWS_FULL,     /* the table of translated flows is full of flows that live: see --flows */
	REASON_FLOW_CLASH, /* no free source port was found towards an endpoint that the client reaches in two ways */
	REASON_FLOW_CUT,   /* a flow that was closing, never answered or of one question gave way in a full table */
	REASON_UNWRITABLE, /* the packet could not be rewritten */
	REASON_NO_LOCAL_BACKEND, /* the Service has endpoints that serve, but none on this node, and wants no others */
	REASON_NOT_LET_IN,       /* the client is not in the Service's loadBalancerSourceRanges */
	REASON_AFFINITIES_FULL,  /* the table of clients that stay with an endpoint is full: this one may change it */
	REASON_NO_PORT,          /* no free port of the node was found towards an endpoint */
	REASON_COUNT,
};
