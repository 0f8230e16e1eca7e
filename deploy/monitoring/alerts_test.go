package main

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/prometheus/model/rulefmt"
)

// on is a node's labels, as the scrape configuration of docs/monitoring.md sets them.
const on = `job="millrace", instance="n1"`

// story is what a node shows, and whether an alert fires. Where all is well it must be
// silent, and so must the others.
type story struct {
	alert string
	// shown are series in the notation of promtool's tests, a value a minute. @ stands
	// for the node's labels.
	shown []string
	// minutes is when it is asked.
	minutes int
	fires   bool
	// says is a part of its texts.
	says string
}

var stories = []story{
	{"MillraceAgentDown", []string{`up{@} 1x5 0x10`}, 12, true, "agent of n1"},
	{"MillraceAgentDown", []string{`up{job="kube-system/millrace", instance="n1"} 1x5 0x10`}, 12, true, "agent of n1"},
	{"MillraceAgentDown", []string{`up{@} 1x5 0x3 1x10`}, 15, false, ""}, // an upgrade
	{"MillraceAgentDown", []string{`up{job="node-exporter", instance="n1"} 0x20`}, 20, false, ""},

	{"MillraceNoAgents", nil, 16, true, "no millrace agent"},
	{"MillraceNoAgents", []string{`millrace_build_info{@, version="1"} 1x20`}, 20, false, ""},
	{"MillraceNoAgents", []string{`millrace_build_info{@, version="1"} 1x2 _x8 1x10`}, 20, false, ""}, // Prometheus moved

	{"MillraceNotReady", []string{`millrace_agent_ready{@} 1 0x10`}, 6, true, "kernel of n1"},
	{"MillraceNotReady", []string{`millrace_agent_ready{@} 0x3 1x10`}, 10, false, ""}, // it starts

	{"MillraceSourceLost", []string{`millrace_agent_source_lost_seconds{@} 0 60+60x10`}, 7, true, "for 7m 0s"},
	{"MillraceSourceLost", []string{`millrace_agent_source_lost_seconds{@} 0 60+60x3 0x10`, `millrace_agent_snapshot_age_seconds{@} 0+60x10`}, 10, false, ""},

	{"MillraceHeldBack", []string{`millrace_agent_unread{@} 0 3x20`}, 12, true, "n1 removes nothing: 3 objects"},
	{"MillraceHeldBack", []string{`millrace_agent_unread{@} 3x5 0x20`}, 12, false, ""},

	{"MillraceProblems", []string{`millrace_agent_problems{@} 0 1x20`}, 17, true, "n1: 1 objects"},
	{"MillraceProblems", []string{`millrace_agent_problems{@} 1x10 0x20`}, 17, false, ""},

	{"MillraceChangesFail", []string{`millrace_layer_changes_failed_total{@, layer="service"} 0x5 6+6x20`}, 20, true, "layer service"},
	{"MillraceChangesFail", []string{`millrace_layer_changes_failed_total{@, layer="service"} 0x5 20x20`}, 20, false, ""}, // for a moment
	{"MillraceChangesFail", []string{`millrace_layer_changes_failed_total{@, layer="service"} 0+0.5x20`}, 20, false, ""},

	{"MillraceSlow", programming(`0+1x30`, `0+30x30`), 30, true, "n1: a change takes 2.0"},
	{"MillraceSlow", programming(`0+30x30`, `0+30x30`), 30, false, ""},
	{"MillraceSlow", programming(`0x30`, `0x30`), 30, false, ""}, // nothing changes

	{"MillraceDrift", []string{`millrace_layer_drift_total{@, layer="service"} 1 1 2 2 3 3 4 4`}, 8, true, "layer service"},
	{"MillraceDrift", []string{`millrace_layer_drift_total{@, layer="service"} 1 1 900x10`}, 8, false, ""}, // somebody's mistake

	{"MillraceRestarts", []string{`process_start_time_seconds{@} 1 2 2 3 4 5x10`}, 10, true, "started 4 times"},
	{"MillraceRestarts", []string{`process_start_time_seconds{@} 1 2 2 3x10`}, 10, false, ""},
	{"MillraceRestarts", []string{`process_start_time_seconds{job="other", instance="n1"} 1 2 3 4 5 6 7x10`}, 10, false, ""},

	{"MillraceVersions", []string{`millrace_build_info{@, version="1"} 1x90`, `millrace_build_info{job="millrace", instance="n2", version="2"} 1x90`}, 70, true, "2 versions"},
	{"MillraceVersions", []string{`millrace_build_info{@, version="1"} 1x90`, `millrace_build_info{job="millrace", instance="n2", version="2"} 1x20 _x70`,
		`millrace_build_info{job="millrace", instance="n2", version="1"} _x20 1x70`}, 70, false, ""},

	{"MillraceDegraded", []string{`millrace_layer_degraded{@, layer="tune"} 2x90`}, 70, true, "2 things the layer tune"},
	{"MillraceDegraded", []string{`millrace_layer_degraded{@, layer="tune"} 2x40 0x50`}, 70, false, ""},

	{"MillraceMapFull", []string{`millrace_map_entries{@, layer="service", map="translations"} 120000x20`, `millrace_map_capacity{@, layer="service", map="translations"} 131072x20`}, 12, true,
		"the map translations is 91.55% full"},
	{"MillraceMapFull", []string{`millrace_map_entries{@, layer="service", map="translations"} 1200x20`, `millrace_map_capacity{@, layer="service", map="translations"} 131072x20`}, 12, false, ""},
	// Trace's maps make room for what is new.
	{"MillraceMapFull", []string{`millrace_map_entries{@, layer="trace", map="events"} 8192x20`, `millrace_map_capacity{@, layer="trace", map="events"} 8192x20`}, 12, false, ""},

	{"MillraceRefused", []string{`millrace_events_total{@, layer="service", reason="flows_full"} 0+10x20`}, 10, true, "lose their endpoint: flows_full"},
	{"MillraceRefused", []string{`millrace_events_total{@, layer="service", reason="flows_full"} 0 10x20`}, 10, false, ""},
	{"MillraceRefused", []string{`millrace_events_total{@, layer="service", reason="forwarded"} 0+10x20`}, 10, false, ""},
	{"MillraceRefused", []string{`millrace_events_total{@, layer="service", reason="flow_cut"} 0+10x20`}, 10, false, ""}, // it gave way, which loses nothing

	{"MillraceNoEndpoints", []string{`millrace_events_total{@, layer="service", reason="no_backend"} 0+120x30`}, 25, true, "2 calls a second (no_backend)"},
	{"MillraceNoEndpoints", []string{`millrace_events_total{@, layer="service", reason="no_backend"} 0+6x30`}, 25, false, ""},
	{"MillraceNoEndpoints", []string{`millrace_events_total{@, layer="service", reason="no_backend"} 0+120x10 1200x20`}, 25, false, ""}, // a rollout

	{"MillraceNoLocalEndpoints", noLocal("internal", "2x30"), 20, true, "cannot reach 4 Service ports"},
	{"MillraceNoLocalEndpoints", noLocal("internal", "2x5 0x30"), 20, false, ""},
	{"MillraceNoLocalEndpoints", noLocal("external", "2x30"), 20, false, ""}, // load balancers go elsewhere

	{"MillraceUnhealthy", []string{`kubeproxy_proxy_healthz_total{@, code="503"} 0+6x30`}, 15, true, "n1 tells load balancers"},
	{"MillraceUnhealthy", []string{`kubeproxy_proxy_healthz_total{@, code="503"} 0 6x30`}, 15, false, ""},
	{"MillraceUnhealthy", []string{`kubeproxy_proxy_healthz_total{@, code="200"} 0+6x30`}, 15, false, ""},

	{"MillraceDrops", drops("shop", "web-0", "NETFILTER_DROP", "0+1200x40"), 30, true, "20 packets a second die in pod shop/web-0 on n1: NETFILTER_DROP"},
	{"MillraceDrops", drops("", "", "IP_RPFILTER", "0+1200x40"), 30, true, "20 packets a second die on n1 itself: IP_RPFILTER"},
	{"MillraceDrops", drops("", "others", "NO_SOCKET", "0+1200x40"), 30, true, "in other namespaces of n1: NO_SOCKET"},
	{"MillraceDrops", drops("shop", "web-0", "NETFILTER_DROP", "0+60x40"), 30, false, ""},
	{"MillraceDrops", drops("shop", "web-0", "NETFILTER_DROP", "0+1200x8 9600x40"), 30, false, ""},
	{"MillraceDrops", drops("shop", "web-0", "TCP_OLD_DATA", "0+1200x40"), 30, false, ""}, // what came twice

	{"MillraceConnectionsFail", ends("0+100x40", "0+10x40", "0+5x40"), 30, true, "n1: 15% of the TCP connections"},
	{"MillraceConnectionsFail", ends("0+100x40", "0+2x40", "0+1x40"), 30, false, ""},
	{"MillraceConnectionsFail", ends("0+2x40", "0+1x40", "0+1x40"), 30, false, ""}, // hardly any connections at all

	{"MillraceDoctorFails", []string{`millrace_doctor_check{instance="n1", id="CT-01", layer="conntrack", severity="critical", status="fail"} 1x3`}, 1, true, "n1: doctor finds CT-01 (conntrack)"},
	{"MillraceDoctorFails", []string{`millrace_doctor_check{instance="n1", id="CT-01", layer="conntrack", severity="critical", status="fail"} 0x3`}, 1, false, ""},

	{"MillraceDoctorWarns", []string{`millrace_doctor_check{instance="n1", id="HS-25", layer="host", severity="warning", status="warn"} 1x90`}, 61, true, "n1: doctor warns of HS-25"},
	{"MillraceDoctorWarns", []string{`millrace_doctor_check{instance="n1", id="HS-27", layer="host", severity="info", status="warn"} 1x90`}, 61, false, ""},
	{"MillraceDoctorWarns", []string{`millrace_doctor_check{instance="n1", id="HS-25", layer="host", severity="warning", status="warn"} 1x30 0x60`}, 61, false, ""},

	{"MillraceDoctorStale", []string{`millrace_doctor_timestamp_seconds{instance="n1"} -90000x5`}, 2, true, "has not run for 1d 1h"},
	{"MillraceDoctorStale", []string{`millrace_doctor_timestamp_seconds{instance="n1"} -3600x5`}, 2, false, ""},

	{"MillraceDoctorUnanswered", []string{`millrace_doctor_node_answered{instance="laptop", node="n3"} 0x3`}, 1, true, "no answer from node n3"},
	{"MillraceDoctorUnanswered", []string{`millrace_doctor_node_answered{instance="laptop", node="n3"} 1x3`}, 1, false, ""},

	{"MillraceTuneDown", []string{`up{job="kube-system/millrace-tune", instance="n1"} 1x3 0x20`}, 20, true, "settings of n1"},
	{"MillraceTuneDown", []string{`up{job="millrace-tune", instance="n1"} 1x3 0x10 1x10`}, 20, false, ""},

	{"MillraceTuneDrift", []string{`millrace_tune_drift{@, knob="conntrack-idle", scope="node"} 0x3 1x5`}, 5, true, "sets what conntrack-idle sets (node)"},
	{"MillraceTuneDrift", []string{`millrace_tune_drift_total{@, knob="conntrack-idle", scope="node"} 0+1x9`}, 5, false, ""}, // it was set again

	{"MillraceTuneFails", []string{`millrace_tune_settings{@, state="refused"} 2x20`}, 16, true, "n1: 2 settings that were chosen are not set: refused"},
	{"MillraceTuneFails", []string{`millrace_tune_settings{@, state="waiting"} 2x20`, `millrace_tune_settings{@, state="failed"} 1x5 0x20`}, 16, false, ""},

	{"MillraceTuneStopped", []string{`millrace_tune_rollout{@, state="stopped"} 0 1x9`}, 7, true, "rolled out any further"},
	{"MillraceTuneStopped", []string{`millrace_tune_rollout{@, state="waiting"} 1x9`, `millrace_tune_rollout{@, state="stopped"} 0x9`}, 7, false, ""},

	{"MillraceTuneUnanswered", []string{`millrace_tune_api_server_answers{@} 0x20`}, 16, true, "n1 does not learn"},
	{"MillraceTuneUnanswered", []string{`millrace_tune_api_server_answers{@} 0x10 1x10`}, 16, false, ""},

	{"MillraceTuneStale", []string{`millrace_tune_last_round_timestamp_seconds{@} -14400x5`}, 2, true, "looked at for 4h"},
	{"MillraceTuneStale", []string{`millrace_tune_last_round_timestamp_seconds{@} -3600x5`}, 2, false, ""},
}

// programming are changes that were in the kernel within 8 milliseconds, and within two
// seconds.
func programming(soon, late string) []string {
	const name = `millrace_agent_programming_duration_seconds_bucket{@, le=`
	return []string{name + `"0.008"} ` + soon, name + `"1.024"} ` + soon, name + `"2.048"} ` + late, name + `"+Inf"} ` + late}
}

func noLocal(policy, values string) (series []string) {
	for _, family := range []string{"IPv4", "IPv6"} {
		series = append(series, `kubeproxy_sync_proxy_rules_no_local_endpoints_total{@, ip_family="`+family+`", traffic_policy="`+policy+`"} `+values)
	}
	return series
}

func drops(namespace, pod, reason, values string) []string {
	return []string{`millrace_drops_total{@, namespace="` + namespace + `", pod="` + pod + `", reason="` + reason + `"} ` + values}
}

func ends(all, refused, unanswered string) []string {
	const name = `millrace_events_total{@, layer="trace", reason="connection `
	return []string{name + `ended"} ` + all, name + `refused"} ` + refused, name + `unanswered"} ` + unanswered}
}

func loadRules(t *testing.T) *rulefmt.RuleGroups {
	t.Helper()
	text, err := os.ReadFile(rulesFile)
	if err != nil {
		t.Fatal(err)
	}
	return parseRules(t, text)
}

// Each alert fires for what it is about, with its texts, and is silent where all is
// well; no other fires for it.
func TestAlerts(t *testing.T) {
	rules := loadRules(t)
	told := map[string][2]bool{}
	for _, s := range stories {
		both := told[s.alert]
		both[map[bool]int{false: 0, true: 1}[s.fires]] = true
		told[s.alert] = both
		var shown []string
		for _, one := range s.shown {
			shown = append(shown, strings.ReplaceAll(one, "@", on))
		}
		if s.alert != "MillraceNoAgents" { // somewhere there is an agent
			shown = append(shown, `millrace_build_info{job="millrace", instance="n1", version="1"} 1x100`)
		}
		firing := newProm(t, rules).after(s.minutes, shown...)
		if others := slices.DeleteFunc(slices.Clone(firing), func(a alert) bool { return a.name == s.alert }); len(others) > 0 {
			t.Errorf("%s: %q: also fires: %v", s.alert, s.shown, others)
		}
		if got := slices.ContainsFunc(firing, func(a alert) bool { return a.name == s.alert }); got != s.fires {
			t.Errorf("%s: %q: fires after %d minutes: %v", s.alert, s.shown, s.minutes, got)
			continue
		}
		for _, a := range firing {
			a.reads(t, s.says)
		}
	}
	for _, group := range rules.Groups {
		for _, rule := range group.Rules {
			if rule.Alert != "" && told[rule.Alert] != [2]bool{true, true} {
				t.Errorf("%s: there is no story in which it fires, or none in which it does not", rule.Alert)
			}
		}
	}
}

// reads says what is wrong with an alert's texts.
func (a alert) reads(t *testing.T, says string) {
	t.Helper()
	for _, name := range []string{"summary", "description", "runbook_url"} {
		text := a.texts[name]
		if text == "" || strings.Contains(text, "<no value>") || strings.Contains(text, "%!") || strings.Contains(text, "{{") {
			t.Errorf("%s: %s is %q", a, name, text)
		}
	}
	if !strings.Contains(a.texts["summary"]+a.texts["description"], says) {
		t.Errorf("%s: its texts are %q, without %q", a, a.texts, says)
	}
	if !strings.Contains(a.texts["description"], "millrace") && !strings.Contains(a.texts["description"], "kubectl") {
		t.Errorf("%s: the description names no command: %q", a, a.texts["description"])
	}
	if a.labels["severity"] == "" {
		t.Errorf("%s has no severity", a)
	}
}
