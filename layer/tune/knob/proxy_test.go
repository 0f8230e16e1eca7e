package knob

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/model"
)

// proxied is node with a kube-proxy whose configuration is as kubeadm writes it.
func proxied(change func(*Facts, *ProxyConfig)) *Facts {
	return node(func(m *Facts, _ *Space) {
		m.KubeProxy = 812
		m.Proxy = &ProxyConfig{Name: "ConfigMap kube-system/kube-proxy", Restart: "restart it", Found: map[string][]string{},
			Values:    map[string]string{fieldMin: "null", fieldEstablished: "", fieldNodePorts: "null", fieldMinSync: "0s", fieldSync: "0s"},
			Conntrack: model.Conntrack{MaxPerCore: 32 << 10, Min: 128 << 10, TCPEstablished: 24 * time.Hour}}
		if change != nil {
			change(m, m.Proxy)
		}
	})
}

// What a kube-proxy sets is changed where it has it from, unless it leaves it alone.
func TestFields(t *testing.T) {
	const goes = "owned net.netfilter.nf_conntrack_buckets: it goes with net.netfilter.nf_conntrack_max, which "
	const sets = "it sets it whenever it starts: conntrack.min: 524288 in its configuration (ConfigMap kube-system/kube-proxy), and restart it"
	const rest = goes + "follows conntrack.min\nowned net.netfilter.nf_conntrack_max: " + sets + "\n"
	const idle = "owned net.netfilter.nf_conntrack_tcp_timeout_established: it sets it whenever it starts: conntrack.tcpEstablishedTimeout: 24h0m0s in its configuration (ConfigMap kube-system/kube-proxy), and restart it\n"
	for _, row := range []struct {
		id     string
		change func(*Facts, *ProxyConfig)
		want   string
	}{
		{"conntrack", nil, rest + "change conntrack.min null -> 524288"},
		{"conntrack", func(_ *Facts, c *ProxyConfig) { c.Values[fieldMin], c.Conntrack.Min = "524288", 524288 },
			rest + "enough conntrack.min: it is so already"},
		{"conntrack", func(_ *Facts, c *ProxyConfig) { c.Conntrack.MaxPerCore = 64 << 10 },
			rest + "enough conntrack.min: it comes to that already, with null: each node has it when its kube-proxy is started again: restart it"},
		{"conntrack", func(_ *Facts, c *ProxyConfig) { c.Conntrack.MaxPerCore = 0 },
			"change net.netfilter.nf_conntrack_buckets 262144 -> 524288\nchange net.netfilter.nf_conntrack_max 262144 -> 524288"},
		{"conntrack", func(m *Facts, c *ProxyConfig) { m.CPUs, m.Memory = 64, 256<<30 },
			goes + "cannot be set: conntrack.maxPerCore (32768) for each of 64 processors is held to 1048576 since Kubernetes 1.36, whatever conntrack.min is: with 0 kube-proxy leaves the setting alone, and a file in /etc/sysctl.d keeps it\n" +
				"owned net.netfilter.nf_conntrack_max: conntrack.maxPerCore (32768) for each of 64 processors is held to 1048576 since Kubernetes 1.36, whatever conntrack.min is: with 0 kube-proxy leaves the setting alone, and a file in /etc/sysctl.d keeps it"},
		{"conntrack", func(_ *Facts, c *ProxyConfig) { c.Unread, c.Values = errors.New("forbidden"), nil }, rest + "unknown conntrack.min: forbidden"},
		{"conntrack", func(_ *Facts, c *ProxyConfig) { c.Owner, c.Where = "Argo CD", "in its repository" },
			rest + "owned conntrack.min: it would put back what is set here: change conntrack.min to 524288 in its repository"},
		{"conntrack-lists", func(m *Facts, _ *ProxyConfig) { m.Spaces[0].Values[trackedLists] = "16384" }, "change net.netfilter.nf_conntrack_buckets 16384 -> 262144"},
		{"conntrack-idle", func(_ *Facts, c *ProxyConfig) {
			c.Values[fieldEstablished], c.Conntrack.TCPEstablished = "48h", 48*time.Hour
		},
			idle + "change conntrack.tcpEstablishedTimeout 48h -> 24h0m0s"},
		{"conntrack-idle", nil, idle + "enough conntrack.tcpEstablishedTimeout: it comes to that already, with nothing said: each node has it when its kube-proxy is started again: restart it"},
		{"conntrack-idle", func(_ *Facts, c *ProxyConfig) { c.Conntrack.TCPEstablished = 0 }, "change net.netfilter.nf_conntrack_tcp_timeout_established 432000 -> 86400"},
		{"proxy-sync", nil, "enough iptables.minSyncPeriod: kube-proxy does not wait longer than it does by itself, or its mode has no such wait"},
		{"PX-18", func(_ *Facts, c *ProxyConfig) {
			c.Values[fieldMinSync], c.Values[fieldSync] = `"10s"`, "1h"
			c.Found["PX-18"] = []string{"iptables.minSyncPeriod: 10s"}
		}, "change iptables.minSyncPeriod \"10s\" -> 1s\nchange iptables.syncPeriod 1h -> 30s"},
		{"PX-04", func(_ *Facts, c *ProxyConfig) { c.Found["PX-04"] = []string{"2 Services"} }, `change nodePortAddresses null -> ["0.0.0.0/0"]`},
		{"proxy-sync", func(m *Facts, _ *ProxyConfig) { m.Proxy = nil }, "unknown iptables.minSyncPeriod: it is in the cluster: say --source kube:KUBECONFIG"},
		{"proxy-sync", func(_ *Facts, c *ProxyConfig) { c.Unread = errors.New("forbidden") }, "unknown iptables.minSyncPeriod: forbidden"},
	} {
		k, err := Find(row.id)
		if err != nil {
			t.Fatal(err)
		}
		all := Plan(proxied(row.change), Ask{Knobs: []*Knob{k}})
		if got := lines(all); got != row.want {
			t.Errorf("%s:\n%s\nwant\n%s", row.id, got, row.want)
		}
		for _, p := range all {
			if p.Scope == Proxy && p.Status == Change && p.Then != "restart it" {
				t.Errorf("%s: it is not said what is to be done then: %+v", row.id, p)
			}
			if p.Field != "" && !slices.ContainsFunc(all, func(q Proposal) bool { return q.Setting == p.Field }) {
				t.Errorf("%s follows %s, which is not there", p.Setting, p.Field)
			}
		}
	}
}

// Unasked, a finding in the cluster justifies a change of the configuration, and a given
// value of a setting that kube-proxy writes goes there.
func TestFieldsUnaskedAndGiven(t *testing.T) {
	if all := Plan(proxied(nil), Ask{}); len(all) > 0 {
		t.Errorf("nothing is wrong, and there are proposals:\n%s", lines(all))
	}
	m := proxied(func(_ *Facts, c *ProxyConfig) { c.Found["PX-04"] = []string{"2 Services"} })
	if all := Plan(m, Ask{}); len(all) != 1 || all[0].Setting != fieldNodePorts || all[0].Finding != "PX-04" || !slices.Equal(all[0].Evidence, []string{"2 Services"}) {
		t.Errorf("%+v", all)
	}
	all := Plan(m, Ask{Given: []Given{{trackedMax, "400000"}}})
	if len(all) != 2 || all[0].Field != fieldMin || all[1].Setting != fieldMin || all[1].Wanted != "400000" || !strings.Contains(all[1].Space, "ConfigMap") {
		t.Errorf("%+v", all)
	}
}
