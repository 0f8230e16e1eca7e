package knob

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/millrace/millrace/test/docs"
)

// node is a machine of 8 processors, 16 GiB, and one card of 10 Gbit/s; nothing is wrong.
func node(change func(m *Facts, s *Space)) *Facts {
	s := &Space{Name: "node", Node: true, Unread: map[string]error{}, Held: map[string]Holding{}, Found: map[string][]string{},
		Files: map[string][][2]string{}, Backlogs: map[uint16]uint32{}, RTT: 0.4,
		Devices: []Gear{{Name: "eth0", Hardware: true, Receive: 1, Send: 4, Channels: 4, Ring: 4096}, {Name: "veth1", Receive: 1, Send: 1}},
		Values: map[string]string{
			somaxconn: "4096", synBacklog: "4096", timeWaits: "131072", portRange: "32768 60999", reservedPorts: "", idleStart: "1",
			receiveWindow: "4096 131072 6291456", sendWindow: "4096 16384 4194304", congestion: "cubic", available: "reno cubic bbr",
			receiveMax: "212992", sendMax: "212992", receiveDefault: "212992", backlog: "1000", backlogTime: "8000", busyRead: "0", busyPoll: "0",
			jitEnable: "1", trackedMax: "262144", trackedLists: "262144", trackedEstablished: "432000", trackedLog: "0",
			"eth0/qdisc": "default mq", "eth0/ring/rx": "512", "eth0/channels": "1", "eth0/rx-0/rps_cpus": "0",
			"eth0/tx-0/xps_cpus": "0", "eth0/tx-1/xps_cpus": "0", "eth0/tx-2/xps_cpus": "0", "eth0/tx-3/xps_cpus": "0",
		}}
	for i, n := range []string{"1024", "512", "128"} {
		for _, family := range []string{"ipv4", "ipv6"} {
			s.Values[fmt.Sprintf("net.%s.neigh.default.gc_thresh%d", family, 3-i)] = n
		}
	}
	s.Fresh = maps.Clone(s.Values)
	m := &Facts{CPUs: 8, Memory: 16 << 30, Speed: 10e9, Spaces: []*Space{s}}
	if change != nil {
		change(m, s)
	}
	return m
}

func found(check string) func(*Facts, *Space) {
	return func(_ *Facts, s *Space) { s.Found[check] = []string{"12 in 2.0 s"} }
}

// lines are proposals as text: "change net.core.somaxconn 4096 -> 8192".
func lines(all []Proposal) string {
	var text []string
	for _, p := range all {
		line := fmt.Sprintf("%s %s %s -> %s", p.Status, p.Setting, p.Current, p.Wanted)
		if p.Status != Change {
			line = fmt.Sprintf("%s %s: %s", p.Status, p.Setting, p.Reason)
		}
		text = append(text, line)
	}
	return strings.Join(text, "\n")
}

// Values are computed for the machine: what is there, and what it comes to.
func TestValues(t *testing.T) {
	for _, row := range []struct {
		id     string
		change func(*Facts, *Space)
		want   string
	}{
		{"accept-queue", nil, "enough net.core.somaxconn: it is so already"},
		{"accept-queue", func(_ *Facts, s *Space) { s.Accepted = 9000 }, "change net.core.somaxconn 4096 -> 16384"},
		{"accept-queue", func(_ *Facts, s *Space) { s.Accepted = 9e6 }, "change net.core.somaxconn 4096 -> 65536"},
		{"accept-queue", func(_ *Facts, s *Space) { s.Found["HS-04"] = []string{"x"}; s.Backlogs[80] = 4096 }, "change net.core.somaxconn 4096 -> 8192"},
		{"accept-queue", func(_ *Facts, s *Space) { s.Found["HS-04"] = []string{"x"}; s.Backlogs[80] = 511 },
			"enough net.core.somaxconn: it is 4096, and no program here asks for that much: raise the backlog that it gives to listen()"},
		{"syn-backlog", func(_ *Facts, s *Space) { s.Values[synBacklog], s.Fresh[synBacklog] = "1024", "1024" }, "change net.ipv4.tcp_max_syn_backlog 1024 -> 4096"},
		{"time-wait", nil, "enough net.ipv4.tcp_max_tw_buckets: nothing is forgotten for want of room (TCPTimeWaitOverflow does not grow): more would do nothing"},
		{"time-wait", found("HS-31"), "change net.ipv4.tcp_max_tw_buckets 131072 -> 262144"},
		{"time-wait", func(m *Facts, s *Space) { found("HS-31")(m, s); m.Memory = 1 << 30 }, "enough net.ipv4.tcp_max_tw_buckets: it is so already"},
		{"local-ports", func(m *Facts, s *Space) {
			found("HS-09")(m, s)
			m.NodePorts, s.Backlogs[9100], s.Backlogs[22], s.Backlogs[9101] = "30000-32767", 1, 1, 1
		}, "change net.ipv4.ip_local_reserved_ports  -> 9100-9101,30000-32767\nchange net.ipv4.ip_local_port_range 32768 60999 -> 4536 60999"},
		{"node-ports", func(m *Facts, s *Space) {
			m.NodePorts, s.Values[reservedPorts], s.Fresh[reservedPorts] = "30000-32767", "8080,32768", "8080,32768"
		},
			"change net.ipv4.ip_local_reserved_ports 8080,32768 -> 8080,30000-32768"},
		{"idle-start", nil, "enough net.ipv4.tcp_slow_start_after_idle: the longest round trip of an open connection is 0.4 ms: it would do next to nothing"},
		{"idle-start", func(_ *Facts, s *Space) { s.RTT = 80 }, "change net.ipv4.tcp_slow_start_after_idle 1 -> 0"},
		{"tcp-window", nil, "enough net.ipv4.tcp_rmem: with round trips of 0.4 ms, the longest of an open connection, what there is suffices"},
		{"tcp-window", func(_ *Facts, s *Space) { s.RTT = 50 }, // 2 * 10e9/8 * 0.05 = 125 MB, a 128th of the memory is 134 MB
			"change net.ipv4.tcp_rmem 4096 131072 6291456 -> 4096 131072 134217728\nchange net.ipv4.tcp_wmem 4096 16384 4194304 -> 4096 16384 134217728"},
		{"tcp-window", func(m *Facts, s *Space) { m.Speed = 0 }, "enough net.ipv4.tcp_rmem: no network card tells its speed"},
		{"bbr", nil, "change net.ipv4.tcp_congestion_control cubic -> bbr"},
		{"socket-buffers", nil, "change net.core.rmem_max 212992 -> 12500000\nchange net.core.wmem_max 212992 -> 12500000"},
		{"socket-buffers", func(m *Facts, _ *Space) { m.Speed = 1e9 }, "change net.core.rmem_max 212992 -> 7500000\nchange net.core.wmem_max 212992 -> 7500000"},
		{"socket-buffers", func(m *Facts, _ *Space) { m.Memory = 1 << 30 }, "change net.core.rmem_max 212992 -> 4194304\nchange net.core.wmem_max 212992 -> 4194304"},
		{"datagram-buffer", func(m *Facts, s *Space) { found("HS-14")(m, s); s.Datagrams = 20000 }, "change net.core.rmem_default 212992 -> 8388608"},
		{"receive-backlog", found("HS-01"), "change net.core.netdev_max_backlog 1000 -> 8192"}, // 10e9/12304*0.008 = 6502
		{"busy-polling", nil, "change net.core.busy_read 0 -> 50\nchange net.core.busy_poll 0 -> 50"},
		{"busy-polling", func(m *Facts, _ *Space) { m.CPUs = 2 }, "enough net.core.busy_read: there are 2 processors, and it takes one for each that waits"},
		{"neighbours", func(m *Facts, _ *Space) { m.Neighbours = [2]int{900, 3} },
			"change net.ipv4.neigh.default.gc_thresh3 1024 -> 2048\nchange net.ipv4.neigh.default.gc_thresh2 512 -> 1024\nchange net.ipv4.neigh.default.gc_thresh1 128 -> 256"},
		{"conntrack", nil, "change net.netfilter.nf_conntrack_buckets 262144 -> 524288\nchange net.netfilter.nf_conntrack_max 262144 -> 524288"}, // 16 GiB/64/400
		{"conntrack", func(m *Facts, s *Space) { found("CT-01")(m, s); s.Tracked = 200000 },
			"change net.netfilter.nf_conntrack_buckets 262144 -> 524288\nchange net.netfilter.nf_conntrack_max 262144 -> 524288"},
		{"conntrack", func(m *Facts, s *Space) { found("CT-01")(m, s); s.Tracked, m.Memory = 260000, 4<<30 },
			"enough net.netfilter.nf_conntrack_buckets: 260000 connections are tracked and 262144 can be: 1/64 of the memory has no room for more; shorten timeouts, or track less"},
		{"conntrack-lists", func(_ *Facts, s *Space) { s.Values[trackedLists] = "16384" }, "change net.netfilter.nf_conntrack_buckets 16384 -> 262144"},
		{"conntrack-idle", nil, "change net.netfilter.nf_conntrack_tcp_timeout_established 432000 -> 86400"},
		{"rps", nil, "change eth0/rx-0/rps_cpus 0 -> ff"},
		{"rps", func(m *Facts, _ *Space) { m.CPUs = 1 }, "enough */rx-*/rps_cpus: each device here has as many receive queues as there are processors: it would only add work"},
		{"rps", func(m *Facts, s *Space) {
			s.Node, s.Devices = false, s.Devices[1:]
			s.Values["veth1/rx-0/rps_cpus"] = "0"
		}, "change veth1/rx-0/rps_cpus 0 -> ff"},
		{"xps", nil, "change eth0/tx-0/xps_cpus 0 -> 11\nchange eth0/tx-1/xps_cpus 0 -> 22\nchange eth0/tx-2/xps_cpus 0 -> 44\nchange eth0/tx-3/xps_cpus 0 -> 88"},
		{"channels", nil, "change eth0/channels 1 -> 4"},
		{"ring", nil, "enough */ring/rx: no card here loses packets for want of room: a longer ring would only be a longer wait"},
		{"ring", found("HS-22"), "change eth0/ring/rx 512 -> 1024"},
		{"fq", nil, "enough */qdisc: the congestion control is cubic, which does not pace"},
		{"fq", func(_ *Facts, s *Space) { s.Values[congestion] = "bbr" }, "change eth0/qdisc default mq -> fq"},
	} {
		k, err := Find(row.id)
		if err != nil {
			t.Fatal(err)
		}
		if got := lines(Plan(node(row.change), Ask{Knobs: []*Knob{k}})); got != row.want {
			t.Errorf("%s:\n%s\nwant\n%s", row.id, got, row.want)
		}
	}
}

// Nobody is fought with, and it is said whom to ask.
func TestOwners(t *testing.T) {
	for _, row := range []struct {
		id     string
		change func(*Facts, *Space)
		want   string
	}{
		{"conntrack", func(m *Facts, _ *Space) { m.KubeProxy = 812 }, "kube-proxy (process 812): it sets it whenever it starts: conntrack.min: 524288 in its configuration (ConfigMap kube-system/kube-proxy), and restart it; `millrace tune apply conntrack --source kube:KUBECONFIG` writes it there"},
		{"conntrack-idle", func(m *Facts, _ *Space) { m.KubeProxy = 812 }, "kube-proxy (process 812): it sets it whenever it starts: conntrack.tcpEstablishedTimeout: 24h0m0s in its configuration (ConfigMap kube-system/kube-proxy), and restart it; `millrace tune apply conntrack-idle --source kube:KUBECONFIG` writes it there"},
		{"socket-buffers", func(_ *Facts, s *Space) { s.Files[receiveMax] = [][2]string{{"/etc/sysctl.d/9.conf", "1000"}} }, "/etc/sysctl.d/9.conf: it sets it to 1000, at the next start of the machine at the latest: ask who wrote it, and change it there"},
		{"conntrack-idle", func(_ *Facts, s *Space) {
			s.Held[trackedEstablished] = Holding{Owner: "conntrack.tcpEstablishedTimeout of x", Wrote: "432000"}
		}, "conntrack.tcpEstablishedTimeout of x: millrace's agent keeps it so: change it there"},
		{"accept-queue", func(_ *Facts, s *Space) {
			s.Values[somaxconn] = "100"
			s.Held[somaxconn] = Holding{Owner: "accept-queue", Wrote: "4096", Ours: true}
		}, "somebody unknown: millrace tune had set it to 4096, and somebody has set it to 100 since: find out who, or let go of it: millrace tune undo accept-queue"},
		{"accept-queue", func(_ *Facts, s *Space) {
			s.Values[somaxconn], s.Accepted = "8192", 9000
			s.Held[somaxconn] = Holding{Owner: "accept-queue", Wrote: "8192", Ours: true, Theirs: true}
		}, "somebody with `millrace tune apply`: it was set to 8192 by hand, and is not kept: ask them, or let go of it: millrace tune undo accept-queue"},
		{"accept-queue", func(_ *Facts, s *Space) { s.Values[somaxconn] = "100" }, "somebody unknown: a new namespace has 4096, so that somebody has set this to 100 (a script or a person): ask them, or put it back first"},
		{"accept-queue", func(_ *Facts, s *Space) { s.Values[somaxconn], s.Node, s.Pod = "100", false, true }, "somebody unknown: a new namespace has 4096, so that somebody has set this to 100 (the pod's securityContext.sysctls, the CNI plug-in tuning, or a process in it): ask them, or put it back first"},
		{"rps", func(_ *Facts, s *Space) { s.Values["eth0/rx-0/rps_cpus"] = "2" }, "somebody unknown: a new device has 0, so that the driver, a script or a person has set this to 2: ask them, or put it back first"},
		{"fq", func(_ *Facts, s *Space) { s.Values[congestion], s.Values["eth0/qdisc"] = "bbr", "htb" }, "somebody unknown: somebody has chosen htb for eth0: ask them, or take it away (tc qdisc del dev eth0 root)"},
	} {
		k, _ := Find(row.id)
		all := Plan(node(row.change), Ask{Knobs: []*Knob{k}})
		owned := max(0, slices.IndexFunc(all, func(p Proposal) bool { return p.Owner != "" }))
		if p := all[owned]; p.Status != Owned || p.Owner+": "+p.Reason != row.want {
			t.Errorf("%s: %s, %s: %s; want %s", row.id, p.Status, p.Owner, p.Reason, row.want)
		}
		for _, p := range all {
			if p.Status == Change {
				t.Errorf("%s: %s would be set, and what goes with it not", row.id, p.Setting)
			}
		}
	}
}

// What we have set ourselves is no owner to be afraid of, and a file that says the same
// is none either.
func TestNoOwners(t *testing.T) {
	k, _ := Find("accept-queue")
	m := node(func(_ *Facts, s *Space) {
		s.Values[somaxconn], s.Accepted = "8192", 9000
		s.Held[somaxconn] = Holding{Owner: "accept-queue", Wrote: "8192", Ours: true}
		s.Files[somaxconn] = [][2]string{{"/etc/sysctl.conf", "65535"}}
	})
	if got := lines(Plan(m, Ask{Knobs: []*Knob{k}})); got != "change net.core.somaxconn 8192 -> 16384" {
		t.Error(got)
	}
}

// What is kept is set again, whatever somebody has made of it, but not against an owner
// who is known.
func TestKeptIsSetAgain(t *testing.T) {
	k, _ := Find("accept-queue")
	m := node(func(_ *Facts, s *Space) {
		s.Values[somaxconn], s.Accepted = "100", 5000
		s.Held[somaxconn] = Holding{Owner: "accept-queue", Wrote: "8192", Ours: true, Again: true}
	})
	if got := lines(Plan(m, Ask{Knobs: []*Knob{k}})); got != "change net.core.somaxconn 100 -> 8192" {
		t.Error(got)
	}
	m.Spaces[0].Files[somaxconn] = [][2]string{{"/etc/sysctl.conf", "100"}}
	if p := Plan(m, Ask{Knobs: []*Knob{k}})[0]; p.Status != Owned || p.Owner != "/etc/sysctl.conf" {
		t.Errorf("%+v", p)
	}
}

// Unasked, only what a finding justifies is proposed, with what was seen.
func TestOnlyWhatIsJustified(t *testing.T) {
	if all := Plan(node(nil), Ask{}); len(all) > 0 {
		t.Errorf("nothing is wrong, and there are proposals:\n%s", lines(all))
	}
	m := node(func(m *Facts, s *Space) {
		pod := *s
		pod.Name, pod.Node, pod.Pod = "pod web", false, true
		pod.Found = map[string][]string{"HS-14": {"9 in 2.0 s"}, "HS-31": {"7 in 2.0 s"}}
		m.Spaces = append(m.Spaces, &pod)
	})
	all := Plan(m, Ask{})
	if len(all) != 2 || all[0].Space != "pod web" || all[0].ID != "time-wait" || all[0].Finding != "HS-31" || !slices.Equal(all[0].Evidence, []string{"7 in 2.0 s"}) ||
		all[1].Space != "node" || all[1].ID != "datagram-buffer" || !slices.Equal(all[1].Evidence, []string{"pod web: 9 in 2.0 s"}) {
		t.Errorf("%+v", all)
	}
}

// Values that somebody else has chosen are judged like computed ones, and what is useless
// is said to be.
func TestGiven(t *testing.T) {
	m := node(func(_ *Facts, s *Space) { s.Files[receiveMax] = [][2]string{{"/etc/sysctl.d/9.conf", "1000"}} })
	m.Spaces = append(m.Spaces, &Space{Name: "pod web", Pod: true, Values: map[string]string{somaxconn: "16384"}, Fresh: map[string]string{somaxconn: "16384"}})
	got := lines(Plan(m, Ask{Given: []Given{{somaxconn, "16384"}, {receiveMax, "9000000"}, {"net.ipv4.tcp_tw_reuse", "1"}, {"kernel.pid_max", "1"}}}))
	want := "change net.core.somaxconn 4096 -> 16384\nenough net.core.somaxconn: it is so already\n" +
		"owned net.core.rmem_max: it sets it to 1000, at the next start of the machine at the latest: ask who wrote it, and change it there\n"
	rest := got[min(len(want), len(got)):]
	if !strings.HasPrefix(got, want) || !strings.HasPrefix(rest, "enough net.ipv4.tcp_tw_reuse: net.ipv4.tcp_tw_reuse is left alone: it is about connections") ||
		strings.Count(rest, "\n") != 1 || !strings.Contains(rest, `unknown kernel.pid_max: nothing that can be tuned is called "kernel.pid_max"`) {
		t.Errorf("%s\nwant\n%s", got, want)
	}
}

// What cannot be read is neither well nor to be set.
func TestUnread(t *testing.T) {
	for id, setting := range map[string]string{"accept-queue": somaxconn, "conntrack": trackedMax, "jit": jitEnable} {
		k, _ := Find(id)
		m := node(func(_ *Facts, s *Space) { delete(s.Values, setting); s.Unread[setting] = errors.New("no such file") })
		for _, p := range Plan(m, Ask{Knobs: []*Knob{k}}) {
			if p.Status != Unknown || !strings.Contains(p.Reason, "no such file") {
				t.Errorf("%s: %+v", id, p)
			}
		}
	}
}

func TestFind(t *testing.T) {
	for name, want := range map[string]string{"accept-queue": "accept-queue", "HS-04": "accept-queue", "ct-01": "conntrack", somaxconn: "accept-queue"} {
		if k, err := Find(name); err != nil || k.ID != want {
			t.Errorf("%s: %v, %v", name, k, err)
		}
	}
	for name, want := range map[string]string{
		"net.ipv4.tcp_tw_recycle": "is left alone: it broke clients", "tcp_fin_timeout": "it shortens FIN_WAIT_2", "nonsense": `nothing that can be tuned is called "nonsense"`,
	} {
		if _, err := Find(name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSuits(t *testing.T) {
	for _, row := range []struct {
		wanted, found string
		atLeast, want bool
	}{
		{"4096", "4096", false, true}, {"4096", "8192", false, false}, {"4096", "8192", true, true}, {"4096", "128", true, false},
		{"1 2 3", "1 2 4", true, true}, {"1 2 3", "1 1 9", true, false}, {"1 2 3", "9", true, false}, {"bbr", "cubic", true, false}, {"", "", false, true},
	} {
		if got := Suits(row.wanted, row.found, row.atLeast); got != row.want {
			t.Errorf("%+v: %v", row, got)
		}
	}
}

func TestMask(t *testing.T) {
	for cpus, want := range map[int]string{1: "1", 2: "3", 4: "f", 6: "3f", 64: strings.Repeat("f", 16), 66: "3" + strings.Repeat("f", 16)} {
		if got := mask(cpus, func(int) bool { return true }); got != want {
			t.Errorf("%d processors: %s, want %s", cpus, got, want)
		}
	}
}

// Each entry says all that a person needs.
func TestTheTableIsWhole(t *testing.T) {
	ids := map[string]bool{}
	for _, k := range Knobs {
		if ids[k.ID] || len(k.Settings) == 0 || k.Title == "" || k.Formula == "" || k.Evidence == "" || k.Pitfall == "" || !strings.Contains(k.Source, "https://") || k.want == nil {
			t.Errorf("%s lacks something", k.ID)
		}
		ids[k.ID] = true
		for _, u := range Uselesses {
			for _, s := range k.Settings {
				if slices.Contains(strings.Split(u.Setting, ", "), s) {
					t.Errorf("%s is set by %s, and called useless", s, k.ID)
				}
			}
		}
	}
	for _, u := range Uselesses {
		if u.Why == "" || !strings.Contains(u.Source, "https://") {
			t.Errorf("%s lacks something", u.Setting)
		}
	}
	for _, p := range Profiles {
		if len(p.Of()) < 3 {
			t.Errorf("profile %s has %d knobs", p, len(p.Of()))
		}
	}
}

// The tables in the docs are made from the knobs.
func TestDocsAreFresh(t *testing.T) {
	const page = "../../../docs/tune.md"
	cell := func(text string) string { return strings.ReplaceAll(text, "|", `\|`) }
	code := func(names []string) string { return "`" + strings.Join(names, "` `") + "`" }
	table := "\n| | settings | scope | how it is computed | what justifies it | profiles |\n|---|---|---|---|---|---|\n"
	pitfalls := "\n| | what the usual advice gets wrong, what speaks against it | where it is written |\n|---|---|---|\n"
	for _, k := range Knobs {
		justified := cell(k.Evidence)
		if len(k.Checks) > 0 {
			justified += " (" + strings.Join(k.Checks, ", ") + ")"
		}
		var profiles []string
		for _, p := range k.Profiles {
			profiles = append(profiles, string(p))
		}
		table += fmt.Sprintf("| `%s`: %s | %s | %s | %s | %s | %s |\n", k.ID, cell(k.Title), code(k.Settings), k.Scope, cell(k.Formula), justified, strings.Join(profiles, ", "))
		pitfalls += fmt.Sprintf("| `%s` | %s | %s |\n", k.ID, cell(k.Pitfall), k.Source)
	}
	useless := "\n| | why it is left alone | where it is written |\n|---|---|---|\n"
	for _, u := range Uselesses {
		useless += fmt.Sprintf("| %s | %s | %s |\n", cell(u.Setting), cell(u.Why), u.Source)
	}
	docs.Fresh(t, page, "knobs", table)
	docs.Fresh(t, page, "pitfalls", pitfalls)
	docs.Fresh(t, page, "useless", useless)
}
