package kubeproxy

import (
	"os"
	"strings"
	"testing"
)

const config = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"

// One field is changed, nothing else, and what was written comes back byte by byte.
func TestSet(t *testing.T) {
	for _, row := range []struct{ what, text, path, was, value, want string }{
		{"a value", config + "conntrack:\n  maxPerCore: 0 # none\n  min: 131072 # ours\nmode: ipvs\n", "conntrack.min", "131072", "524288",
			config + "conntrack:\n  maxPerCore: 0 # none\n  min: 524288 # ours\nmode: ipvs\n"},
		{"null", config + "conntrack:\n  min:   null\n", "conntrack.min", "null", "5", config + "conntrack:\n  min:   5\n"},
		{"quotes", config + "conntrack: {tcpEstablishedTimeout: \"24h\", min: 1} # a\n", "conntrack.tcpEstablishedTimeout", `"24h"`, "12h0m0s",
			config + "conntrack: {tcpEstablishedTimeout: 12h0m0s, min: 1} # a\n"},
		{"other quotes", config + "conntrack:\n  tcpEstablishedTimeout: '2''4h'\n", "conntrack.tcpEstablishedTimeout", "'2''4h'", "1h",
			config + "conntrack:\n  tcpEstablishedTimeout: 1h\n"},
		{"a list", config + "nodePortAddresses: [] # all\nmode: nftables\n", "nodePortAddresses", "[]", `["0.0.0.0/0"]`,
			config + "nodePortAddresses: [\"0.0.0.0/0\"] # all\nmode: nftables\n"},
		{"one that is not there", config + "conntrack:\n  maxPerCore: 7\n  # the end\nmode: ipvs\n", "conntrack.min", "", "5",
			config + "conntrack:\n  maxPerCore: 7\n  min: 5\n  # the end\nmode: ipvs\n"},
		{"nor what it is in", config + "mode: ipvs\n", "conntrack.min", "", "5", config + "mode: ipvs\nconntrack:\n  min: 5\n"},
		{"without an end", config + "mode: ipvs", "conntrack.min", "", "5", config + "mode: ipvs\nconntrack:\n  min: 5"},
		{"in braces", config + "conntrack: {maxPerCore: 7}\n", "conntrack.min", "", "5", config + "conntrack: {min: 5, maxPerCore: 7}\n"},
		{"in empty braces", config + "conntrack: {}\n", "conntrack.min", "", "5", config + "conntrack: {min: 5}\n"},
		{"at the top", config + "mode: ipvs\n", "nodePortAddresses", "", "[primary]", config + "mode: ipvs\nnodePortAddresses: [primary]\n"},
		{"beside others", "kind: ClusterConfiguration\nconntrack: {min: 1}\n---\n" + config + "conntrack:\n  min: 2\n---\nkind: Other\nconntrack:\n  min: 3\n", "conntrack.min", "2", "4",
			"kind: ClusterConfiguration\nconntrack: {min: 1}\n---\n" + config + "conntrack:\n  min: 4\n---\nkind: Other\nconntrack:\n  min: 3\n"},
		{"beside what is no ASCII", config + "conntrack: {ä: 'ü', min: 2}\n", "conntrack.min", "2", "4", config + "conntrack: {ä: 'ü', min: 4}\n"},
	} {
		was, err := Value([]byte(row.text), row.path)
		if err != nil || was != row.was {
			t.Errorf("%s: it is %q, %v; want %q", row.what, was, err, row.was)
		}
		got, err := Set([]byte(row.text), row.path, row.value)
		if err != nil || string(got) != row.want {
			t.Errorf("%s: %v\n%s\nwant\n%s", row.what, err, got, row.want)
			continue
		}
		if back, err := Set(got, row.path, row.was); err != nil || string(back) != row.text {
			t.Errorf("%s: put back: %v\n%s\nwant\n%s", row.what, err, back, row.text)
		}
	}
	// A value that is not written at all becomes null when it is put back, and a mapping
	// without one is empty then, which is the same to a kube-proxy.
	for _, row := range []struct{ text, want, back string }{
		{"conntrack:\n  min:\n  maxPerCore: 1\n", "conntrack:\n  min: 5\n  maxPerCore: 1\n", "conntrack:\n  min: null\n  maxPerCore: 1\n"},
		{"conntrack:\n  min: # of what\n", "conntrack:\n  min: 5 # of what\n", "conntrack:\n  min: null # of what\n"},
		{"conntrack: null # none\n", "conntrack: {min: 5} # none\n", "conntrack: {} # none\n"},
		{"conntrack:\nmode: ipvs\n", "conntrack: {min: 5}\nmode: ipvs\n", "conntrack: {}\nmode: ipvs\n"},
		{`conntrack: {"min": 7, "maxPerCore": 0}`, `conntrack: {"min": 5, "maxPerCore": 0}`, `conntrack: {"min": 7, "maxPerCore": 0}`},
	} {
		was, err := Value([]byte(config+row.text), "conntrack.min")
		if err != nil {
			t.Fatal(err)
		}
		got, err := Set([]byte(config+row.text), "conntrack.min", "5")
		if err != nil || string(got) != config+row.want {
			t.Errorf("%q: %v\n%s", row.text, err, got)
		}
		if back, err := Set(got, "conntrack.min", was); err != nil || string(back) != config+row.back {
			t.Errorf("%q: put back: %v\n%s\nwant\n%s", row.text, err, back, row.back)
		}
	}
}

// What cannot be changed alone is left to a person.
func TestSetRefuses(t *testing.T) {
	for what, text := range map[string]string{
		"an alias":            config + "a: &a {min: 1}\nconntrack: *a\n",
		"an anchor":           config + "conntrack:\n  min: &n 5\n  maxPerCore: *n\n",
		"JSON":                `{"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration"}`,
		"no mapping":          config + "conntrack: [1]\n",
		"several lines":       config + "conntrack:\n  min: |\n    5\n",
		"lines of a text":     config + "conntrack:\n  maxPerCore: >\n    5\n    6\n",
		"a tag":               config + "conntrack:\n  min: !!str 5\n",
		"braces of 2 lines":   config + "conntrack: {min: [\n 5]}\n",
		"another kind":        "kind: Other\n",
		"no YAML":             config + "conntrack: [\n",
		"a key that is twice": config + "conntrack:\n  min: 1\n  min: 2\n",
	} {
		if got, err := Set([]byte(text), "conntrack.min", "7"); err == nil {
			t.Errorf("%s: it became\n%s", what, got)
		}
	}
	if _, err := Set([]byte(config+"conntrack:\n  min: 1\n"), "conntrack.min", "5, maxPerCore: 9\nmode: ipvs"); err == nil {
		t.Error("a value that is more than one")
	}
}

// What kubeadm writes: each field that is tuned, there and back.
func TestSetOfKubeadm(t *testing.T) {
	text, err := os.ReadFile("testdata/kubeadm.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for path, value := range map[string]string{
		"conntrack.min": "524288", "conntrack.tcpEstablishedTimeout": "24h0m0s", "iptables.minSyncPeriod": "1s", "nodePortAddresses": `["0.0.0.0/0"]`,
	} {
		was, err := Value(text, path)
		if err != nil {
			t.Fatal(err)
		}
		changed, err := Set(text, path, value)
		if err != nil {
			t.Fatal(err)
		}
		before, after := strings.Split(string(text), "\n"), strings.Split(string(changed), "\n")
		differ := 0
		for i := range before {
			if before[i] != after[i] {
				differ++
			}
		}
		if differ != 1 || len(before) != len(after) {
			t.Errorf("%s: %d lines differ of %d and %d", path, differ, len(before), len(after))
		}
		if back, err := Set(changed, path, was); err != nil || string(back) != string(text) {
			t.Errorf("%s: put back: %v", path, err)
		}
	}
}

// Whatever the text, either nothing else than the field says something new, or it is
// refused; and it never panics.
func FuzzSet(f *testing.F) {
	f.Add(config+"conntrack:\n  min: 1\n", "5")
	f.Add(config+"conntrack: {min: [1, 'a']}\n---\na: b", "null")
	f.Add(config+"conntrack:\n  maxPerCore: \"1\"\n  # x\n", "\"a\"")
	f.Fuzz(func(t *testing.T, text, value string) {
		set, err := Set([]byte(text), "conntrack.min", value)
		if err != nil {
			return
		}
		if got, err := Value(set, "conntrack.min"); err != nil || got != value {
			t.Errorf("%q, %v", got, err)
		}
	})
}
