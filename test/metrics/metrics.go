// Package metrics holds the list of metrics that deploy/monitoring is made for to what
// programs show. It is for tests; it writes the list only with UPDATE_GOLDEN=1, and costs
// its reading.
package metrics

import (
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// List is the list, from the root of the repository.
const List = "deploy/monitoring/metrics.txt"

var (
	metricType  = regexp.MustCompile(`(?m)^# TYPE (\S+) (\S+)$`)
	metricValue = regexp.MustCompile(`(?m)^([a-z_0-9]+)(?:\{(.*)\})? \S+$`)
	metricLabel = regexp.MustCompile(`(\w+)="((?:[^"\\]|\\.)*)"`)
)

// families are the metrics of an exposition, "counter NAME LABEL LABEL", in order.
func families(text string) (lines []string) {
	labels := map[string]map[string]bool{}
	for _, sample := range metricValue.FindAllStringSubmatch(text, -1) {
		if labels[sample[1]] == nil {
			labels[sample[1]] = map[string]bool{}
		}
		for _, label := range metricLabel.FindAllStringSubmatch(sample[2], -1) {
			labels[sample[1]][label[1]] = true
		}
	}
	for _, family := range metricType.FindAllStringSubmatch(text, -1) {
		name, kind := family[1], family[2]
		with := labels[name]
		if kind == "histogram" {
			with = maps.Clone(labels[name+"_bucket"])
			delete(with, "le")
		}
		lines = append(lines, strings.Join(slices.Concat([]string{kind, name}, slices.Sorted(maps.Keys(with))), " "))
	}
	slices.Sort(lines)
	return lines
}

// Values are those of one label of a metric, where another label has a value; in order.
func Values(text, metric, label, where string) (values []string) {
	for _, sample := range metricValue.FindAllStringSubmatch(text, -1) {
		if sample[1] != metric || !strings.Contains(sample[2], where) {
			continue
		}
		for _, one := range metricLabel.FindAllStringSubmatch(sample[2], -1) {
			if one[1] == label {
				values = append(values, one[2])
			}
		}
	}
	slices.Sort(values)
	return slices.Compact(values)
}

// Listed checks, or with UPDATE_GOLDEN writes, the part of the list that is of one
// program: its metrics, as the text that it shows has them, and further lines. root is
// the way to the root of the repository.
func Listed(t *testing.T, root, program, shown string, further ...string) {
	t.Helper()
	lines := families(shown)
	if len(lines) < 4 {
		t.Fatalf("%s shows hardly any metrics: %q", program, shown)
	}
	part := "## " + program + "\n" + strings.Join(append(lines, further...), "\n") + "\n\n"
	path := root + "/" + List
	list, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, begun := strings.Cut(string(list), "## "+program+"\n")
	_, after, more := strings.Cut(rest, "\n## ")
	if more {
		after = "## " + after
	}
	if !begun {
		before = strings.TrimRight(before, "\n") + "\n\n"
	}
	if now := before + part + after; now != string(list) {
		if os.Getenv("UPDATE_GOLDEN") == "" {
			t.Errorf("%s: the part of %q is not what it shows: run this test with UPDATE_GOLDEN=1, then those of deploy/monitoring. It shows:\n%s", List, program, part)
		} else if err := os.WriteFile(path, []byte(now), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
