package main

import "strings"

// The kinds of charts, by Grafana's names.
const (
	lined   = "timeseries"
	counted = "stat"
	tabled  = "table"
)

type row struct {
	title  string
	charts []chart
}

// chart is one panel.
type chart struct {
	kind, title string
	// about is what a reader should know who sees it for the first time.
	about string
	// unit is Grafana's name of it; of a table, "none" hides the value.
	unit    string
	width   int
	queries []query
	// bad is the number from which on a counted chart is red; 0 for never.
	bad float64
	// columns is the order of a table's columns.
	columns []string
}

type query struct{ expr, legend string }

// chosen stands in a query for the nodes that are chosen at the top of the page.
const chosen = `job=~"$job", instance=~"$instance"`

// text is the query as Prometheus gets it: @ stands for chosen.
func (q query) text() string { return strings.ReplaceAll(q.expr, "@", chosen) }

func one(expr, legend string) []query { return []query{{expr, legend}} }

// pair is the legend of what is told by pairs of pods.
const pair = "{{client_namespace}}/{{client}} -> {{server_namespace}}/{{server}}"

var rows = []row{
	{"Now", []chart{
		{counted, "Agents", "Nodes whose agent Prometheus sees.", "short", 4, one(`count(millrace_build_info{@})`, "agents"), 0, nil},
		{counted, "Not ready", "Nodes in whose kernel the cluster is not, or not whole: `millrace status` there says why.", "short", 4,
			one(`count(millrace_agent_ready{@} == 0) or vector(0)`, "nodes"), 1, nil},
		{counted, "Source lost for", "The longest time that an agent has not reached its source. Services stay as they were.", "s", 4,
			one(`max(millrace_agent_source_lost_seconds{@})`, "lost"), 300, nil},
		{counted, "Objects that hold back", "They could not be read and were never known. While there are any, that node removes nothing.", "short", 4,
			one(`sum(millrace_agent_unread{@})`, "objects"), 1, nil},
		{counted, "Problems", "Objects of the cluster that an agent cannot use; `millrace status` names each.", "short", 4,
			one(`max(millrace_agent_problems{@})`, "objects"), 1, nil},
		{counted, "Checks that fail", "Of doctor, on all nodes where it runs, whatever is chosen above.", "short", 4,
			one(`count(millrace_doctor_check{status="fail"} == 1) or vector(0)`, "checks"), 1, nil},
		{tabled, "Alerts that fire", "Of millrace.rules.yaml; docs/monitoring.md says what to do about each.", "none", 24,
			one(`ALERTS{alertname=~"Millrace.+", alertstate="firing"}`, ""), 0, []string{"severity", "alertname", "instance"}},
	}},
	{"Agents", []chart{
		{lined, "Ready", "1: the cluster was seen whole and is in the kernel.", "short", 8, one(`millrace_agent_ready{@}`, "{{instance}}"), 0, nil},
		{lined, "Source lost, age of the picture", "Where nothing changes, the picture grows old and all is well: only lost is a fault.", "s", 8,
			[]query{{`millrace_agent_source_lost_seconds{@}`, "{{instance}} lost"}, {`millrace_agent_snapshot_age_seconds{@}`, "{{instance}} age"}}, 0, nil},
		{lined, "Agents by version", "Two for long: an upgrade is stuck.", "short", 8, one(`count by (version) (millrace_build_info{@})`, "{{version}}"), 0, nil},
		{lined, "From noticing a change to the kernel", "Of all nodes chosen.", "s", 8, []query{
			{`histogram_quantile(0.5, sum by (le) (rate(millrace_agent_programming_duration_seconds_bucket{@}[$__rate_interval])))`, "half within"},
			{`histogram_quantile(0.99, sum by (le) (rate(millrace_agent_programming_duration_seconds_bucket{@}[$__rate_interval])))`, "99 of 100 within"}}, 0, nil},
		{lined, "Bringing a change into the kernel", "The part of it that is the kernel's tables: 99 of 100 within.", "s", 8,
			one(`histogram_quantile(0.99, sum by (instance, le) (rate(kubeproxy_sync_proxy_rules_duration_seconds_bucket{@, ip_family="IPv4"}[$__rate_interval])))`, "{{instance}}"), 0, nil},
		{lined, "A change waits for", "How long the newest change has been known and is not in the kernel; 0 as a rule. Only in kube-proxy's place.", "s", 8,
			one(`(time() - kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{@, ip_family="IPv4"}) * (kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{@, ip_family="IPv4"} > bool kubeproxy_sync_proxy_rules_last_timestamp_seconds{@, ip_family="IPv4"})`, "{{instance}}"), 0, nil},
		{lined, "Changes applied", "By layer and what they did.", "ops", 8, one(`sum by (layer, op) (rate(millrace_layer_changes_total{@}[$__rate_interval]))`, "{{layer}} {{op}}"), 0, nil},
		{lined, "Changes that failed", "They are tried again after 10 s at most.", "ops", 8,
			one(`sum by (instance, layer) (rate(millrace_layer_changes_failed_total{@}[$__rate_interval]))`, "{{instance}} {{layer}}"), 0, nil},
		{lined, "Objects that somebody altered", "Found by looking once a minute, and mended.", "short", 8,
			one(`sum by (instance, layer) (increase(millrace_layer_drift_total{@}[5m]))`, "{{instance}} {{layer}}"), 0, nil},
		{lined, "Not in full, cannot be used, held back", "`millrace status` says each: as degraded, problem, held back.", "short", 8, []query{
			{`millrace_layer_degraded{@} > 0`, "{{instance}} {{layer}} degraded"}, {`millrace_agent_problems{@} > 0`, "{{instance}} problems"}, {`millrace_agent_unread{@} > 0`, "{{instance}} held back"}}, 0, nil},
		{lined, "Memory", "Of the agent, and of its maps in the kernel.", "bytes", 8,
			[]query{{`process_resident_memory_bytes{@}`, "{{instance}} agent"}, {`sum by (instance) (millrace_map_bytes{@})`, "{{instance}} maps"}}, 0, nil},
		{lined, "Processors in use by the agent", "1 is one processor.", "short", 8, one(`rate(process_cpu_seconds_total{@}[$__rate_interval])`, "{{instance}}"), 0, nil},
		{lined, "Starts in an hour", "No packet is lost by a start, but changes wait for it.", "short", 8, one(`changes(process_start_time_seconds{@}[1h])`, "{{instance}}"), 0, nil},
	}},
	{"Services", []chart{
		{lined, "Objects in force", "The most that a node has, by layer: Services' ports, settings, signals.", "short", 8, one(`max by (layer) (millrace_layer_objects{@})`, "{{layer}}"), 0, nil},
		{lined, "Connections sent to an endpoint", "At connect() or with the first packet; what follows of a connection is not counted.", "ops", 8,
			one(`sum by (instance) (rate(millrace_events_total{@, layer="service", reason="forwarded"}[$__rate_interval]))`, "{{instance}}"), 0, nil},
		{lined, "Not sent to an endpoint", "By reason; docs/service.md explains each.", "ops", 8,
			one(`sum by (reason) (rate(millrace_events_total{@, layer="service", reason!~"forwarded|closed_tcp|closed_udp"}[$__rate_interval])) > 0`, "{{reason}}"), 0, nil},
		{lined, "Sockets closed as their endpoint is gone", "Their clients notice at once instead of waiting.", "ops", 8,
			one(`sum by (reason) (rate(millrace_events_total{@, layer="service", reason=~"closed_tcp|closed_udp"}[$__rate_interval]))`, "{{reason}}"), 0, nil},
		{lined, "Service ports without an endpoint on the node", "Their traffic policy is Local, and others have endpoints. internal: pods there cannot reach them; external: load balancers leave the node out.", "short", 8,
			one(`sum by (instance, traffic_policy) (kubeproxy_sync_proxy_rules_no_local_endpoints_total{@}) > 0`, "{{instance}} {{traffic_policy}}"), 0, nil},
		{lined, "Answers to load balancers and kubelets", "Of /healthz and /livez on kube-proxy's port, by status. 503: send nothing here.", "reqps", 8, []query{
			{`sum by (code) (rate(kubeproxy_proxy_healthz_total{@}[$__rate_interval]))`, "healthz {{code}}"}, {`sum by (code) (rate(kubeproxy_proxy_livez_total{@}[$__rate_interval]))`, "livez {{code}}"}}, 0, nil},
	}},
	{"Flows and maps", []chart{
		{lined, "Translated flows", "What of Services' traffic is tracked: only what goes packet by packet. The kernel's own table is not used for it; node_exporter has that one (node_nf_conntrack_entries).", "short", 8, []query{
			{`millrace_map_entries{@, layer="service", map="translations"}`, "{{instance}} flows"}, {`max(millrace_map_capacity{@, layer="service", map="translations"})`, "room"}}, 0, nil},
		{lined, "Fill of the maps", "Of the Services; the fullest node. Tables grow before they fill, translations do not (--flows).", "percentunit", 8,
			one(`max by (map) (millrace_map_entries{@, layer="service"} / millrace_map_capacity{@, layer="service"})`, "{{map}}"), 0, nil},
		{lined, "Entries of trace's maps", "Those make room for what is new: being full is no fault.", "short", 8, one(`max by (map) (millrace_map_entries{@, layer="trace"})`, "{{map}}"), 0, nil},
		{lined, "Memory of the maps", "The most that a node needs.", "bytes", 24, one(`max by (layer, map) (millrace_map_bytes{@})`, "{{layer}} {{map}}"), 0, nil},
	}},
	{"Drops", []chart{
		{lined, "Packets that died, by reason", "The kernel's reasons (enum skb_drop_reason), the fifteen most frequent. Some die where all is well; `millrace show drops` leaves those out.", "pps", 12,
			one(`topk(15, sum by (reason) (rate(millrace_drops_total{@}[$__rate_interval])))`, "{{reason}}"), 0, nil},
		{lined, "Packets that died, by pod", "In whose network namespace; the fifteen with the most. Without a pod it is the node's own, others are namespaces without a name.", "pps", 12,
			one(`topk(15, sum by (instance, namespace, pod) (rate(millrace_drops_total{@}[$__rate_interval])))`, "{{instance}} {{namespace}}/{{pod}}"), 0, nil},
		{tabled, "Most in the last hour", "By pod and reason. Why, and what to do: `millrace trace` on that node.", "short", 12,
			one(`topk(20, sum by (instance, namespace, pod, reason) (increase(millrace_drops_total{@}[1h])) > 0)`, ""), 0, []string{"instance", "namespace", "pod", "reason", "Value"}},
		{lined, "All that trace counts", "By kind and reason, all namespaces together, the fifteen most frequent.", "ops", 12,
			one(`topk(15, sum by (reason) (rate(millrace_events_total{@, layer="trace", reason!~"connection .+"}[$__rate_interval])))`, "{{reason}}"), 0, nil},
	}},
	{"Connections", []chart{
		{lined, "How TCP connections end", "On all nodes chosen. ended counts all; refused, unanswered and reset are among them.", "ops", 12,
			one(`sum by (reason) (rate(millrace_events_total{@, layer="trace", reason=~"connection .+"}[$__rate_interval]))`, "{{reason}}"), 0, nil},
		{lined, "Refused or never answered", "Share of the connections that ended. Between whom: `millrace show flows` on that node.", "percentunit", 12,
			one(`sum by (instance) (rate(millrace_events_total{@, layer="trace", reason=~"connection refused|connection unanswered"}[10m])) / sum by (instance) (rate(millrace_events_total{@, layer="trace", reason="connection ended"}[10m]))`, "{{instance}}"), 0, nil},
		{lined, "Bytes between pods", "As the client's node sees them, sent and received; the fifteen that are the most. A node names 100 pairs, the rest is others.", "Bps", 12,
			one(`topk(15, sum by (client_namespace, client, server_namespace, server, direction) (rate(millrace_flow_bytes_total{@, seen_by="client"}[$__rate_interval])))`, pair+" {{direction}}"), 0, nil},
		{lined, "Segments sent again between pods", "Loss on the way, or an end that is too slow. Where: `millrace trace CLIENT SERVER` on that node.", "pps", 12,
			one(`topk(15, sum by (client_namespace, client, server_namespace, server) (rate(millrace_flow_retransmits_total{@}[$__rate_interval])) > 0)`, pair), 0, nil},
		{lined, "Connections between pods that failed", "Refused, never answered, or reset by the other end; as the end sees it that has seen more of them.", "ops", 12,
			one(`topk(15, max by (client_namespace, client, server_namespace, server, verdict) (sum by (client_namespace, client, server_namespace, server, verdict, seen_by) (rate(millrace_flow_connections_ended_total{@, verdict!="ok"}[$__rate_interval]))) > 0)`, pair+" {{verdict}}"), 0, nil},
		{lined, "Open connections between pods that do not get on", "unanswered: they wait for the answer to their SYN; retransmitting: or for a window that is zero.", "short", 12,
			one(`topk(15, max by (client_namespace, client, server_namespace, server, verdict) (sum by (client_namespace, client, server_namespace, server, verdict, seen_by) (millrace_flow_connections_open{@, verdict!="ok"})) > 0)`, pair+" {{verdict}}"), 0, nil},
		{lined, "Longest round trip between pods", "Smoothed, of the connections that are open; the fifteen longest.", "s", 12,
			one(`topk(15, max by (client_namespace, client, server_namespace, server) (millrace_flow_rtt_seconds{@}))`, pair), 0, nil},
	}},
	{"Names", []chart{
		{lined, "Who answers pods' queries", "Where the agent runs with --dns. In the kernel; by the agent, of what the kernel handed it; by the cluster's DNS servers. Where it does not, all of them go to those, and none is counted.", "reqps", 8, []query{
			{`sum(rate(millrace_events_total{@, layer="dns", reason=~"answered|nodata|nxdomain|outside|outside_nodata|outside_nxdomain|outside_stale|collapsed"}[$__rate_interval]))`, "kernel"},
			{`sum(rate(millrace_events_total{@, layer="dns", reason="replied"}[$__rate_interval]))`, "agent"},
			{`sum(rate(millrace_events_total{@, layer="dns", reason=~"not_plain|not_ours|left|unsure|stale|changed|crowded|back"}[$__rate_interval]))`, "DNS servers"}}, 0, nil},
		{lined, "Queries by what became of them in the kernel", "docs/dns.md explains each.", "reqps", 8,
			one(`sum by (reason) (rate(millrace_events_total{@, layer="dns", reason!~"agent_.+|replied|back"}[$__rate_interval])) > 0`, "{{reason}}"), 0, nil},
		{lined, "Queries by what they came to in the agent", "cache, stale, upstream and cluster are answers; the others go to the cluster's DNS servers.", "reqps", 8,
			one(`sum by (reason) (rate(millrace_events_total{@, layer="dns", reason=~"agent_.+"}[$__rate_interval])) > 0`, "{{reason}}"), 0, nil},
		{lined, "Fill of the maps of names", "The fullest node.", "percentunit", 12, one(`max by (map) (millrace_map_entries{@, layer="dns"} / millrace_map_capacity{@, layer="dns"})`, "{{map}}"), 0, nil},
		{lined, "Answers that were lost", "The kernel could not write them; the pod asks again after 5 s. None is normal.", "short", 12,
			one(`sum by (instance) (increase(millrace_events_total{@, layer="dns", reason="lost"}[5m])) > 0`, "{{instance}}"), 0, nil},
	}},
	{"Doctor", []chart{
		{tabled, "What doctor finds", "On all nodes where it runs, whatever is chosen above. `millrace doctor --explain ID` says what a check is about.", "none", 12,
			one(`millrace_doctor_check{status=~"fail|warn"} == 1`, ""), 0, []string{"status", "severity", "id", "layer", "instance"}},
		{lined, "Checks by what they came to", "skip: it could not look.", "short", 12, one(`sum by (status) (millrace_doctor_check)`, "{{status}}"), 0, nil},
		{lined, "Since doctor ran last", "Its findings are as old.", "s", 8, one(`time() - millrace_doctor_timestamp_seconds`, "{{instance}}"), 0, nil},
		{lined, "Time that doctor took", "With its window.", "s", 8, one(`millrace_doctor_seconds`, "{{instance}}"), 0, nil},
		{lined, "Namespaces that doctor read", "Fewer than pods: it may not enter some, or they are virtual machines.", "short", 8, one(`millrace_doctor_namespaces`, "{{instance}}"), 0, nil},
		{tabled, "On which nodes", "Of `millrace doctor --nodes -o prom`, where one machine asks all.", "none", 12,
			one(`millrace_doctor_found_on == 1`, ""), 0, []string{"severity", "id", "layer", "node"}},
		{tabled, "Nodes without an answer", "Likewise: what is said of all nodes is without these.", "none", 12, one(`millrace_doctor_node_answered == 0`, ""), 0, []string{"node"}},
	}},
	{"Tune", []chart{
		{lined, "Settings that are left to somebody else", "They were set again three times, and each time somebody set them otherwise. `millrace tune status` on that node.", "short", 8,
			one(`sum by (instance, knob, scope) (millrace_tune_drift) > 0`, "{{instance}} {{knob}} {{scope}}"), 0, nil},
		{lined, "Settings found otherwise than they were set", "And set again.", "short", 8, one(`sum by (instance, knob, scope) (increase(millrace_tune_drift_total[5m])) > 0`, "{{instance}} {{knob}} {{scope}}"), 0, nil},
		{lined, "Settings by what became of them", "held: as chosen; waiting: other nodes first; refused: somebody else's.", "short", 8, one(`sum by (state) (millrace_tune_settings)`, "{{state}}"), 0, nil},
		{lined, "Nodes by what becomes of the choice", "stopped: doctor found more than before where it was tried.", "short", 8, one(`sum by (state) (millrace_tune_rollout)`, "{{state}}"), 0, nil},
		{lined, "Rounds of looking and setting", "failed: the log says why.", "ops", 8, one(`sum by (result) (rate(millrace_tune_rounds_total[$__rate_interval]))`, "{{result}}"), 0, nil},
		{lined, "Since the last round", "Of the node that is the furthest behind.", "s", 8, one(`max(time() - millrace_tune_last_round_timestamp_seconds)`, "longest"), 0, nil},
		{lined, "Nodes to which the API server does not answer", "Nothing new is set there meanwhile.", "short", 8, one(`count(millrace_tune_api_server_answers == 0)`, "nodes"), 0, nil},
	}},
}
