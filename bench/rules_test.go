package bench

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write what is made into testdata instead of comparing with it")

// golden compares text with a file in testdata and prints the first line that
// is another.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	gotLines, wantLines := strings.Split(got, "\n"), strings.Split(string(data), "\n")
	for i := range max(len(gotLines), len(wantLines)) {
		if lineAt(gotLines, i) != lineAt(wantLines, i) {
			t.Fatalf("%s:%d (accept with go test -update)\n got %s\nwant %s", path, i+1, lineAt(gotLines, i), lineAt(wantLines, i))
		}
	}
}

func lineAt(lines []string, i int) string {
	if i < len(lines) {
		return lines[i]
	}
	return "(no line)"
}

func TestRuleSets(t *testing.T) {
	services := cluster(2, 3, 1)
	golden(t, "iptables.rules", iptablesRules(services))
	golden(t, "nftables.rules", nftablesRules(services))
	changed := withReplacedEndpoint(services[1])
	golden(t, "iptables-change.rules", iptablesChange(services, services[1], changed))
	golden(t, "nftables-change.rules", nftablesChange(services, services[1], changed))
}

// A change writes a rule for each Service where kube-proxy does, and chains of
// the one that changed alone.
func TestAChangeIsOfOneService(t *testing.T) {
	services := cluster(500, 2, 499)
	changed := withReplacedEndpoint(services[499])
	rules := iptablesChange(services, services[499], changed)
	if got := len(portals(rules)); got != 500 {
		t.Errorf("%d of 500 Services have a rule in KUBE-SERVICES", got)
	}
	for what, want := range map[string]int{":KUBE-SVC-": 1, ":KUBE-SEP-": 2, "-A PREROUTING": 0, "-A INPUT": 0, "10.244.2.3:8080": 0, "DNAT --to-destination 10.244.2.4:8080": 1} {
		if got := strings.Count(rules, what); got != want {
			t.Errorf("%q is in the change %d times, want %d", what, got, want)
		}
	}
	if services[499].Ports[0].Backends[1].Address.String() != "10.244.2.3:8080" {
		t.Error("the Service that was there before the change has changed")
	}
	rules = nftablesChange(services, services[499], changed)
	if lines := strings.Count(rules, "\n"); lines > 20 || strings.Contains(rules, "add element") {
		t.Errorf("the change of one Service has %d lines:\n%s", lines, rules)
	}
}

// portals are the addresses in the rules that pick a Service, in their order.
func portals(rules string) []string {
	var found []string
	for line := range strings.Lines(rules) {
		rest, ok := strings.CutPrefix(line, "-A KUBE-SERVICES ")
		if _, after, to := strings.Cut(rest, "-d "); ok && to {
			found = append(found, strings.TrimSuffix(strings.Fields(after)[0], "/32"))
		}
	}
	return found
}

func TestPositionOfTheTestedService(t *testing.T) {
	for position, want := range map[string]int{First: 0, Middle: 5, Last: 10} {
		tested, err := testedIndex(position, 11)
		if err != nil {
			t.Fatal(err)
		}
		services := cluster(11, 2, tested)
		order := portals(iptablesRules(services))
		if len(order) != 11 {
			t.Fatalf("%d of 11 Services have a rule in KUBE-SERVICES", len(order))
		}
		if address := services[tested].ClusterIPs[0].String(); order[want] != address {
			t.Errorf("%s: rule %d of 11 is for %s, not for the tested Service's %s", position, want+1, order[want], address)
		}
		for i, service := range services {
			live := podRange.Contains(service.Ports[0].Backends[0].Address.Addr())
			if live != (i == want) {
				t.Errorf("%s: Service %d leads to backends that answer: %v", position, i, live)
			}
		}
	}
	if _, err := testedIndex("lst", 11); err == nil || !strings.Contains(err.Error(), "first, middle or last") {
		t.Errorf("an unknown position gives %v, not a sentence that names the known ones", err)
	}
}

// Each of n endpoints must be drawn by 1/n of the connections.
func TestEndpointsAreDrawnEvenly(t *testing.T) {
	rules := iptablesRules(cluster(1, 4, 0))
	for _, probability := range []string{"0.2500000000", "0.3333333333", "0.5000000000"} {
		if strings.Count(rules, "--probability "+probability) != 1 {
			t.Errorf("no single rule matches with probability %s:\n%s", probability, rules)
		}
	}
}

func TestLargeClustersHaveFewerComments(t *testing.T) {
	small, large := iptablesRules(cluster(500, 2, 0)), iptablesRules(cluster(1001, 1, 0))
	if !strings.Contains(small, `--comment "bench/service-7:http"`) {
		t.Error("1000 endpoints: endpoint chains have no comments")
	}
	if strings.Contains(large, `--comment "bench/service-7:http"`) {
		t.Error("1001 endpoints: endpoint chains have comments")
	}
	if !strings.Contains(large, `--comment "bench/service-7:http cluster IP"`) {
		t.Error("1001 endpoints: the rules that pick a Service have no comment")
	}
}

// No two Services, endpoints or chains may share an address or a name.
func TestNothingIsSharedInALargeCluster(t *testing.T) {
	seen := map[string]string{}
	once := func(what, who string) {
		if other, taken := seen[what]; taken {
			t.Fatalf("%s is of %s and of %s", what, other, who)
		}
		seen[what] = who
	}
	services := cluster(20000, 4, 9999)
	for _, service := range services {
		who := service.String()
		once(service.ClusterIPs[0].String(), who)
		if !serviceRange.Contains(service.ClusterIPs[0]) {
			t.Fatalf("%s has address %s, not in %s", who, service.ClusterIPs[0], serviceRange)
		}
		for _, backend := range service.Ports[0].Backends {
			once(backend.Address.String(), who)
		}
	}
	for line := range strings.Lines(iptablesRules(services)) {
		if strings.HasPrefix(line, ":KUBE-S") && len(line) > len(":KUBE-SERVICES - [0:0]\n") {
			once(line, fmt.Sprintf("chain %s", line))
		}
	}
}
