package main

import (
	"encoding/json"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// An answer says whose it is: no two endpoints that can be there have one address,
// all are in the range that leads to them, and none is a Service's.
func TestEndpointsSayWhoseTheyAre(t *testing.T) {
	all, services := netip.MustParsePrefix(endpointRange), netip.MustParsePrefix(serviceV4)
	for _, service := range []int{0, 1, 2, 255, 9_999, mostServices - 1} {
		if at := clusterIP(service); !services.Contains(at) {
			t.Errorf("Service %d is at %s, which is not in %s", service, at, serviceV4)
		}
		for _, generation := range []int{0, 1, generations - 1} {
			for number := range endpointsOf(service) {
				at := endpoint(service, number, generation)
				who, when := whose(at)
				if who != service || when != generation || !all.Contains(at) {
					t.Errorf("endpoint %d of Service %d, generation %d, is %s: of Service %d, generation %d", number, service, generation, at, who, when)
				}
			}
		}
	}
}

func TestReportComparesWithMillrace(t *testing.T) {
	r := newReport(&scaleSettings{services: 10, rounds: 1, proxies: "millrace,nftables"})
	for i := range 100 {
		r.add("millrace", changeAlone, float64(i+1))
		r.add("nftables", changeAlone, float64(10*i+10))
	}
	v := r.row("nftables", changeAlone, "ms")
	// The median of 100 is between the 41st and the 60th with at least 95 %.
	if v.Median != 500 || v.P99 != 990 || v.Low != 410 || v.High != 600 || *v.Ratio != 10 || *v.RatioP99 != 10 || v.Samples != 100 {
		t.Errorf("of 10, 20 ... 1000 beside 1, 2 ... 100 the row is %+v", v)
	}
	if few := r.row("nftables", loadTime, "s"); few != nil {
		t.Errorf("what was not measured is %+v", few)
	}
}

// A small run, with all its proxies, leaves figures and nothing else.
func TestScaleOfAFewServices(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: it makes network namespaces and cgroups")
	}
	t.Chdir(root)
	built(t, scaleTools)
	folder := t.TempDir()
	for _, build := range [][]string{
		{"-C", moduleFolder, "-o", filepath.Join(folder, "cluster"), "."},
		{"-o", filepath.Join(folder, "millrace"), "./cmd/millrace"},
	} {
		if text, err := exec.Command("go", append([]string{"build"}, build...)...).CombinedOutput(); err != nil {
			t.Fatalf("go build %s: %v\n%s", build, err, text)
		}
	}
	command := exec.Command(filepath.Join(folder, "cluster"), "scale", "--services", "50", "--rounds", "1", "--changes", "2",
		"--pause", "10ms", "--proxies", strings.Join(proxyNames(), ","), "--amid", "2", "--millrace", filepath.Join(folder, "millrace"), "--logs", folder, "-o", "json")
	var said strings.Builder
	command.Stderr = &said
	text, err := command.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, said.String())
	}
	var made struct{ Rows []row }
	if err := json.Unmarshal(text, &made); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	measured := map[string]int{}
	for _, row := range made.Rows {
		measured[row.Variant]++
		if wanted := map[string]int{changeAlone: 2, changeAmid: 2, loadTime: 1}[row.Metric]; wanted > 0 && (row.Samples != wanted || row.Median <= 0) {
			t.Errorf("%s of %s was measured %d times, median %v %s", row.Metric, row.Variant, row.Samples, row.Median, row.Unit)
		}
	}
	for _, proxy := range proxyNames() {
		if measured[proxy] != len(metrics) {
			t.Errorf("%d metrics of %s, not %d", measured[proxy], proxy, len(metrics))
		}
	}
	for _, left := range []string{scaleFolder, "/run/netns/" + scaleControl, "/run/netns/" + scaleNode} {
		if _, err := os.Stat(left); err == nil {
			t.Errorf("%s is left", left)
		}
	}
}
