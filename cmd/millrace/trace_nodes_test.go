package main

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/millrace/millrace/layer/trace/cause"
)

// What nodes say is told as one, each with its name; one that fails is told, too, and
// only if none answers the command does.
func TestJoinedNodes(t *testing.T) {
	says := func(namespace, what string) *traceReport {
		return &traceReport{
			WindowSeconds: 3, Kernel: "6.18.1", Namespaces: []string{namespace}, Others: 1, Lost: 2, Missing: []string{"no BTF"},
			Verdicts: []cause.Verdict{{Cause: what, Where: cause.Where{Node: "its own name", Namespace: namespace}}},
			Folded:   []folded{{"QUEUE_PURGE", namespace, 7}},
		}
	}
	r, err := joined([]answer{{"n1", says("node", "no-route"), nil}, {"n2", nil, errors.New("pod is gone")}, {"n3", says("pod a", "no-listener"), nil}})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(r.Nodes, []string{"n1", "n3"}) || r.Node != "n1, n3" || r.Kernel != "6.18.1" || r.Others != 2 || r.Lost != 4 {
		t.Errorf("joined: %+v", r)
	}
	if !slices.Equal(r.Namespaces, []string{"n1: node", "n3: pod a"}) || !slices.Equal(r.Missing, []string{"n1: no BTF", "node n2: pod is gone", "n3: no BTF"}) {
		t.Errorf("namespaces %q, missing %q", r.Namespaces, r.Missing)
	}
	if len(r.Verdicts) != 2 || r.Verdicts[1].Where.Node != "n3" || r.Folded[1].Namespace != "n3: pod a" {
		t.Errorf("verdicts %+v, folded %+v", r.Verdicts, r.Folded)
	}
	var text strings.Builder
	r.Kernel += "\x1b[2J"
	r.Folded[0].Namespace += "\x1b[2J"
	r.Times = []stepTime{{From: timeSpot{Namespace: "\x1b[2J"}}}
	if err := r.print(&text); err != nil || !strings.Contains(text.String(), "node n3: pod a") || !strings.Contains(text.String(), "not seen: node n2: pod is gone") || strings.Contains(text.String(), "\x1b[2J") {
		t.Errorf("%v: %s", err, text.String())
	}
	var failed *failure
	if _, err := joined([]answer{{"n2", nil, errors.New("pod is gone\n\x1b[2J")}}); !errors.As(err, &failed) || failed.status != exitIncomplete || err.Error() != "node n2: pod is gone; ?[2J" {
		t.Errorf("nobody answers: %v", err)
	}
}

// A pod of any node is told by its addresses, a Service by its name; a namespace of this
// machine means nothing elsewhere.
func TestEndsForOtherNodes(t *testing.T) {
	four, six := netip.MustParseAddr("10.244.1.4"), netip.MustParseAddr("fd00::4")
	n := &names{
		pods: map[netip.Addr]string{four: "shop/web-0", six: "shop/web-0"}, services: map[netip.Addr]string{},
		nodes: map[netip.Addr]string{netip.MustParseAddr("192.168.0.1"): "n1"},
		of:    map[string][]netip.Addr{"n1": {netip.MustParseAddr("192.168.0.1")}, "shop/web-0": {four, six}, "shop/db": {netip.MustParseAddr("10.96.0.9")}},
	}
	for arg, want := range map[string]string{
		"shop/web-0": "10.244.1.4,fd00::4", "shop/web-0:80": "10.244.1.4:80,[fd00::4]:80", "shop/db:5432": "shop/db:5432",
		"10.0.0.1": "10.0.0.1", "10.0.0.1:80": "10.0.0.1:80", "[fd00::1]:80": "[fd00::1]:80", "fd00::1": "fd00::1", "10.0.0.0/8": "10.0.0.0/8", "n1": "192.168.0.1", "n1:22": "192.168.0.1:22", ":53": ":53",
	} {
		got, err := n.spelled(arg)
		if err != nil || got != want {
			t.Errorf("%s is %q, %v; want %q", arg, got, err, want)
		}
		if _, err := n.parseEnd(got); err != nil {
			t.Errorf("%s, told as %s, cannot be read: %v", arg, got, err)
		}
	}
	for _, arg := range []string{"node", ":dns", "shop/absent", "10.0.0.1,shop"} {
		if got, err := n.spelled(arg); err == nil {
			t.Errorf("%s is %q", arg, got)
		}
	}
}

func TestNodesCommandLine(t *testing.T) {
	for _, row := range []struct {
		args []string
		want string
	}{
		{[]string{"--nodes", "all", "--for", "1s"}, "--nodes goes with --source kube:PATH"},
		{[]string{"--nodes", "all", "--source", "kube:/absent"}, "--nodes takes --for"},
		{[]string{"--nodes", "all", "--source", "kube:/absent", "--for", "1h"}, "--nodes takes --for"},
		{[]string{"--nodes", "n1", "--source", "kube:/absent", "--for", "1s", "--netns", "a"}, "--netns and --pcap are of one node"},
	} {
		if _, stderr, status := millrace(t, append([]string{"trace"}, row.args...)...); status != exitUsage || !strings.Contains(stderr, row.want) {
			t.Errorf("%q: exit status %d, %q; want %q", row.args, status, stderr, row.want)
		}
	}
}
