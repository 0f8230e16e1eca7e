package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/relabel"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql/parser"
	"go.yaml.in/yaml/v3"
)

const (
	metricsFile = "metrics.txt"
	page        = "../../docs/monitoring.md"
)

// notShown are exported and on no panel, with the reason. A name that ends in * stands
// for all that begin so.
var notShown = map[string]string{
	"go_*":      "of every Go program; Grafana's own dashboards for those have them",
	"process_*": "likewise, but for memory, processor time and starts",
}

// foreign are metrics that Prometheus makes itself.
var foreign = []string{"up", "ALERTS"}

// metric is a line of metrics.txt.
type metric struct {
	kind   string
	labels []string
}

// exported reads metrics.txt, by the name under which Prometheus stores each; reasons
// are the values that rules may name.
func exported(t *testing.T) (metrics map[string]metric, reasons map[string][]string) {
	t.Helper()
	text, err := os.ReadFile(metricsFile)
	if err != nil {
		t.Fatal(err)
	}
	metrics, reasons = map[string]metric{}, map[string][]string{}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if of, values, ok := strings.Cut(line, ": "); ok && strings.HasPrefix(line, "reasons ") {
			reasons[strings.TrimPrefix(of, "reasons ")] = strings.Split(values, ", ")
			continue
		}
		words := strings.Fields(line)
		if len(words) < 2 || strings.HasPrefix(line, "#") {
			continue
		}
		m := metric{words[0], words[2:]}
		if m.kind != "histogram" {
			metrics[words[1]] = m
			continue
		}
		metrics[words[1]+"_bucket"] = metric{m.kind, append(slices.Clone(m.labels), "le")}
		metrics[words[1]+"_sum"], metrics[words[1]+"_count"] = m, m
	}
	if len(metrics) < 30 {
		t.Fatalf("%s has %d metrics: the test is blind", metricsFile, len(metrics))
	}
	return metrics, reasons
}

// parseRules reads rules as Prometheus does, strictly.
func parseRules(t *testing.T, text []byte) *rulefmt.RuleGroups {
	t.Helper()
	rules, errs := rulefmt.Parse(text, false, model.UTF8Validation, reader, slog.New(slog.DiscardHandler))
	for _, err := range errs {
		t.Error(err)
	}
	if rules == nil || len(rules.Groups) == 0 {
		t.Fatal("there are no rules")
	}
	return rules
}

// selectors are the series that an expression reads.
func selectors(t *testing.T, where, expr string) (all []*parser.VectorSelector) {
	t.Helper()
	parsed, err := reader.ParseExpr(expr)
	if err != nil {
		t.Fatalf("%s: %v", where, err)
	}
	parser.Inspect(parsed, func(node parser.Node, _ []parser.Node) error {
		if s, ok := node.(*parser.VectorSelector); ok {
			all = append(all, s)
		}
		return nil
	})
	return all
}

// names holds what an expression reads to what nodes show: the metric, its labels, and the
// reasons that are named.
func names(t *testing.T, where, expr string, recorded []string) (used []string) {
	t.Helper()
	metrics, reasons := exported(t)
	for _, s := range selectors(t, where, expr) {
		used = append(used, s.Name)
		if slices.Contains(foreign, s.Name) || slices.Contains(recorded, s.Name) {
			continue
		}
		m, there := metrics[s.Name]
		if !there {
			t.Errorf("%s: no node shows %s", where, s.Name)
			continue
		}
		layer := ""
		for _, matcher := range s.LabelMatchers {
			if matcher.Name == "layer" {
				layer = matcher.Value
			}
		}
		for _, matcher := range s.LabelMatchers {
			own := append([]string{model.MetricNameLabel, "job", "instance"}, m.labels...)
			if !slices.Contains(own, matcher.Name) {
				t.Errorf("%s: %s has no label %s: %v", where, s.Name, matcher.Name, m.labels)
			}
			if known := reasons[s.Name+" "+layer]; matcher.Name == "reason" && known != nil {
				namesReasons(t, where, matcher, known)
			}
		}
	}
	return used
}

// namesReasons: what matches no reason that there is guards against nothing.
func namesReasons(t *testing.T, where string, m *labels.Matcher, known []string) {
	t.Helper()
	for _, word := range strings.Split(m.Value, "|") {
		one := labels.MustNewMatcher(labels.MatchRegexp, m.Name, word)
		if !slices.ContainsFunc(known, one.Matches) {
			t.Errorf("%s: there is no reason %q: %v", where, word, known)
		}
	}
}

func recordedBy(rules *rulefmt.RuleGroups) (names []string) {
	for _, group := range rules.Groups {
		for _, rule := range group.Rules {
			if rule.Record != "" {
				names = append(names, rule.Record)
			}
		}
	}
	return names
}

func TestRulesReadWhatNodesShow(t *testing.T) {
	rules := loadRules(t)
	recorded := recordedBy(rules)
	for _, group := range rules.Groups {
		for _, rule := range group.Rules {
			names(t, rule.Alert+rule.Record, rule.Expr, recorded)
		}
	}
}

// An alert about packets that die leaves out exactly what dies where all is well.
func TestUsualReasonsAreLeftOut(t *testing.T) {
	_, reasons := exported(t)
	want := reasons["millrace_drops_total usual"]
	for _, group := range loadRules(t).Groups {
		for _, rule := range group.Rules {
			if rule.Alert != "MillraceDrops" {
				continue
			}
			for _, m := range selectors(t, rule.Alert, rule.Expr)[0].LabelMatchers {
				if m.Name == "reason" && !slices.Equal(strings.Split(m.Value, "|"), want) {
					t.Errorf("%s leaves out %s, and those are usual: %s", rule.Alert, m.Value, strings.Join(want, "|"))
				}
			}
			return
		}
	}
	t.Error("there is no MillraceDrops")
}

// The dashboard is read strictly, each panel asks for what nodes show, and each metric is
// on a panel or left out with a reason.
func TestDashboard(t *testing.T) {
	text, err := os.ReadFile(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	var d dashboard
	if err := decoder.Decode(&d); err != nil {
		t.Fatal(err)
	}
	used := map[string]bool{}
	ids := map[int]bool{}
	for i, p := range d.Panels {
		if ids[p.ID] || p.ID == 0 {
			t.Errorf("panel %q has the number %d, as another", p.Title, p.ID)
		}
		ids[p.ID] = true
		for _, other := range d.Panels[:i] {
			if overlap(p.GridPos, other.GridPos) {
				t.Errorf("panels %q and %q lie on each other", p.Title, other.Title)
			}
		}
		if p.GridPos.X+p.GridPos.W > columns {
			t.Errorf("panel %q is cut off", p.Title)
		}
		if p.Type == "row" {
			continue
		}
		if p.Description == "" || len(p.Targets) == 0 || p.Datasource == nil || p.Datasource.UID != "${datasource}" {
			t.Errorf("panel %q lacks a description, a query or the data source that is chosen", p.Title)
		}
		for _, target := range p.Targets {
			for _, name := range names(t, "panel "+p.Title, asAsked(target.Expr), nil) {
				used[name] = true
			}
		}
	}
	if len(d.Panels) < 30 {
		t.Errorf("only %d panels: the test is blind", len(d.Panels))
	}
	metrics, _ := exported(t)
	covered(t, metrics, used)
}

// covered says which metrics are on no panel and not left out for a reason, and which
// reasons are not needed.
func covered(t *testing.T, metrics map[string]metric, used map[string]bool) {
	t.Helper()
	needed := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(metrics)) {
		family := name
		if metrics[name].kind == "histogram" {
			family = regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(name, "")
		}
		if used[name] || metrics[name].kind == "histogram" && used[family+"_bucket"] {
			continue
		}
		i := slices.IndexFunc(slices.Collect(maps.Keys(notShown)), func(pattern string) bool { return matches(pattern, name) })
		if i < 0 {
			t.Errorf("%s is on no panel: add one to panels.go, or a reason to notShown", name)
			continue
		}
		for pattern := range notShown {
			needed[pattern] = needed[pattern] || matches(pattern, name)
		}
	}
	for pattern, reason := range notShown {
		if !needed[pattern] || reason == "" {
			t.Errorf("notShown has %q, which is not needed, or has no reason", pattern)
		}
	}
}

func matches(pattern, name string) bool {
	start, all := strings.CutSuffix(pattern, "*")
	return name == pattern || all && strings.HasPrefix(name, start)
}

func overlap(a, b gridPos) bool {
	return a.X < b.X+b.W && b.X < a.X+a.W && a.Y < b.Y+b.H && b.Y < a.Y+a.H
}

// asAsked is a query as Grafana sends it, with its own variables filled in.
func asAsked(expr string) string {
	return strings.NewReplacer("$__rate_interval", "5m", "$job", "millrace", "$instance", "n1").Replace(expr)
}

// What is made is what its source says, and the operator's manifest has the same rules.
func TestWhatIsMadeIsFresh(t *testing.T) {
	files, err := made()
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range files {
		if have, err := os.ReadFile(name); err != nil || !bytes.Equal(have, want) {
			t.Errorf("%s is not fresh (%v): go generate in deploy/monitoring", name, err)
		}
	}
	var object struct {
		APIVersion string `yaml:"apiVersion"`
		Kind       string
		Metadata   struct{ Name, Namespace string }
		Spec       map[string]any
	}
	if err := yaml.Unmarshal(files[objectFile], &object); err != nil {
		t.Fatal(err)
	}
	text, err := yaml.Marshal(object.Spec)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(*parseRules(t, text)), fmt.Sprint(*loadRules(t)); got != want || object.Kind != "PrometheusRule" {
		t.Errorf("the %s has other rules:\n%s\nnot\n%s", object.Kind, got, want)
	}
}

var templated = regexp.MustCompile(`\{\{ \$labels\.(\w+) \}\}`)

// plain is a text for the page: without templates.
func plain(text string) string {
	text = templated.ReplaceAllStringFunc(text, func(m string) string { return strings.ToUpper(templated.FindStringSubmatch(m)[1]) })
	text = regexp.MustCompile(`\{\{ (if|else|end).*?\}\}`).ReplaceAllString(text, "")
	return regexp.MustCompile(`\{\{ \$value.*?\}\}`).ReplaceAllString(text, "N")
}

// comments are those before each alert: why its threshold is what it is.
func comments(t *testing.T) map[string]string {
	t.Helper()
	text, err := os.ReadFile(rulesFile)
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct {
			Rules []yaml.Node
		}
	}
	if err := yaml.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for _, group := range file.Groups {
		for _, rule := range group.Rules {
			lines := strings.Split(rule.HeadComment, "\n")
			for i, line := range lines {
				lines[i] = strings.TrimSpace(strings.TrimPrefix(line, "#"))
			}
			found[rule.Content[1].Value] = strings.Join(lines, " ")
		}
	}
	return found
}

// The page has a part for each alert, to which its runbook_url leads.
func TestPageOfAlerts(t *testing.T) {
	why := comments(t)
	var b strings.Builder
	for _, group := range loadRules(t).Groups {
		for _, rule := range group.Rules {
			if rule.Alert == "" {
				continue
			}
			if why[rule.Alert] == "" {
				t.Errorf("%s: no comment says why its threshold is what it is", rule.Alert)
			}
			if want := "https://github.com/millrace/millrace/blob/main/docs/monitoring.md#" + strings.ToLower(rule.Alert); rule.Annotations["runbook_url"] != want {
				t.Errorf("%s: runbook_url is %s, not %s", rule.Alert, rule.Annotations["runbook_url"], want)
			}
			when := "`" + shortened(rule.Expr) + "`"
			if rule.For > 0 {
				when += " for " + rule.For.String()
			}
			fmt.Fprintf(&b, "### %s\n\n**%s.** %s\n\nFires when %s (%s). %s\n\n", rule.Alert, plain(rule.Annotations["summary"]),
				plain(rule.Annotations["description"]), when, rule.Labels["severity"], why[rule.Alert])
		}
	}
	fresh(t, "alerts", strings.TrimSpace(b.String()))
	b.Reset()
	b.WriteString("| exported, and on no panel | why |\n|---|---|\n")
	for _, name := range slices.Sorted(maps.Keys(notShown)) {
		fmt.Fprintf(&b, "| `%s` | %s |\n", name, notShown[name])
	}
	fresh(t, "panels", strings.TrimSpace(b.String()))
}

// shortened leaves long lists out of an expression.
func shortened(expr string) string {
	return regexp.MustCompile(`"[A-Z0-9_|]{80,}"`).ReplaceAllString(expr, `"..."`)
}

// fresh checks, or with UPDATE_GOLDEN writes, what the page has between its two marks.
func fresh(t *testing.T, mark, want string) {
	t.Helper()
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, begun := strings.Cut(string(text), "<!-- "+mark+": made by `go test` in deploy/monitoring with UPDATE_GOLDEN=1 -->\n")
	_, after, ended := strings.Cut(rest, "<!-- end of "+mark+" -->")
	if !begun || !ended {
		t.Fatalf("%s has no place for %q", page, mark)
	}
	now := before + "<!-- " + mark + ": made by `go test` in deploy/monitoring with UPDATE_GOLDEN=1 -->\n" + want + "\n<!-- end of " + mark + " -->" + after
	if now == string(text) {
		return
	}
	if os.Getenv("UPDATE_GOLDEN") == "" {
		t.Fatalf("%s: %q is stale: run this test with UPDATE_GOLDEN=1", page, mark)
	}
	if err := os.WriteFile(page, []byte(now), 0o644); err != nil {
		t.Fatal(err)
	}
}

// The scrape configuration of the page finds the agent's pods, and no others, at their
// node's address and by their node's name.
func TestScrapeConfigurationOfThePage(t *testing.T) {
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "\n```\nscrape_configs:")
	block, _, ended := strings.Cut(rest, "\n```")
	var file struct {
		Scrape []struct {
			Job     string            `yaml:"job_name"`
			Relabel []*relabel.Config `yaml:"relabel_configs"`
		} `yaml:"scrape_configs"`
	}
	if err := yaml.Unmarshal([]byte("scrape_configs:"+block), &file); err != nil || !ended || len(file.Scrape) != 1 || len(file.Scrape[0].Relabel) != 4 {
		t.Fatalf("%v: %+v of %q", err, file, block)
	}
	pod := map[string]string{"__address__": "10.0.0.7", "__meta_kubernetes_pod_label_app_kubernetes_io_name": "millrace", "__meta_kubernetes_pod_container_name": "agent",
		"__meta_kubernetes_pod_host_ip": "10.0.0.7", "__meta_kubernetes_pod_node_name": "n1"}
	for _, c := range file.Scrape[0].Relabel {
		if err := c.Validate(model.UTF8Validation); err != nil {
			t.Fatal(err)
		}
	}
	target := labels.NewBuilder(labels.FromMap(pod))
	kept := relabel.ProcessBuilder(target, file.Scrape[0].Relabel...)
	if found := target.Labels(); !kept || found.Get("__address__") != "10.0.0.7:9470" || found.Get("instance") != "n1" || file.Scrape[0].Job != "millrace" {
		t.Errorf("kept: %v, %s, job %s", kept, found, file.Scrape[0].Job)
	}
	pod["__meta_kubernetes_pod_label_app_kubernetes_io_name"] = "millrace-remove"
	if relabel.ProcessBuilder(labels.NewBuilder(labels.FromMap(pod)), file.Scrape[0].Relabel...) {
		t.Error("a pod that has no metrics is asked as well")
	}
}
