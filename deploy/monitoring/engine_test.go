package main

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/template"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/util/annotations"
)

// evaluated is how often rules are evaluated here, and how far apart samples are:
// Prometheus' own default is a minute as well.
const evaluated = time.Minute

// measured is one number of a series.
type measured struct {
	at    int64 // milliseconds
	value float64
}

func (m measured) ST() int64                     { return 0 }
func (m measured) T() int64                      { return m.at }
func (m measured) F() float64                    { return m.value }
func (m measured) H() *histogram.Histogram       { return nil }
func (m measured) FH() *histogram.FloatHistogram { return nil }
func (m measured) Type() chunkenc.ValueType      { return chunkenc.ValFloat }
func (m measured) Copy() chunks.Sample           { return m }

// shelf is the storage that Prometheus' engine reads: all series in memory.
type shelf struct {
	storage.LabelQuerier
	series map[string]*storage.SeriesEntry
	values map[string][]chunks.Sample
}

func (s *shelf) add(of labels.Labels, at time.Time, value float64) {
	key := of.String()
	s.values[key] = append(s.values[key], measured{at.UnixMilli(), value})
	s.series[key] = storage.NewListSeries(of, s.values[key])
}

// Querier implements storage.Queryable.
func (s *shelf) Querier(_, _ int64) (storage.Querier, error) { return s, nil }

// Select implements storage.Querier.
func (s *shelf) Select(_ context.Context, _ bool, _ *storage.SelectHints, matchers ...*labels.Matcher) storage.SeriesSet {
	found := &set{at: -1}
	for _, one := range s.series {
		if !slices.ContainsFunc(matchers, func(m *labels.Matcher) bool { return !m.Matches(one.Labels().Get(m.Name)) }) {
			found.series = append(found.series, one)
		}
	}
	slices.SortFunc(found.series, func(a, b storage.Series) int { return labels.Compare(a.Labels(), b.Labels()) })
	return found
}

// Close implements storage.Querier.
func (s *shelf) Close() error { return nil }

type set struct {
	series []storage.Series
	at     int
}

func (s *set) Next() bool                        { s.at++; return s.at < len(s.series) }
func (s *set) At() storage.Series                { return s.series[s.at] }
func (s *set) Err() error                        { return nil }
func (s *set) Warnings() annotations.Annotations { return nil }

// prom is Prometheus as far as rules are concerned.
type prom struct {
	t      *testing.T
	engine *promql.Engine
	rules  *rulefmt.RuleGroups
	stored *shelf
	// since is when an alert's condition began to hold, by rule and labels.
	since map[string]time.Time
}

// alert is one that fires, with its texts.
type alert struct {
	name   string
	labels map[string]string
	texts  map[string]string
}

var reader = parser.NewParser(parser.Options{})

func newProm(t *testing.T, rules *rulefmt.RuleGroups) *prom {
	return &prom{t: t, rules: rules, since: map[string]time.Time{},
		stored: &shelf{series: map[string]*storage.SeriesEntry{}, values: map[string][]chunks.Sample{}},
		engine: promql.NewEngine(promql.EngineOpts{MaxSamples: 1e6, Timeout: time.Minute, Parser: reader, EnableAtModifier: true, EnableNegativeOffset: true})}
}

// after loads series in the notation of promtool's tests, one value a minute, evaluates
// all rules each minute until then, and returns the alerts that fire.
func (p *prom) after(minutes int, series ...string) (firing []alert) {
	p.t.Helper()
	begin := time.Unix(0, 0)
	for _, one := range series {
		of, values, err := reader.ParseSeriesDesc(one)
		if err != nil {
			p.t.Fatalf("%s: %v", one, err)
		}
		for i, v := range values {
			if !v.Omitted {
				p.stored.add(of, begin.Add(time.Duration(i)*evaluated), v.Value)
			}
		}
	}
	for i := range minutes + 1 {
		firing = p.evaluate(begin.Add(time.Duration(i) * evaluated))
	}
	return firing
}

func (p *prom) ask(expr string, at time.Time) promql.Vector {
	p.t.Helper()
	query, err := p.engine.NewInstantQuery(context.Background(), p.stored, nil, expr, at)
	if err != nil {
		p.t.Fatalf("%s: %v", expr, err)
	}
	defer query.Close()
	result := query.Exec(context.Background())
	if scalar, ok := result.Value.(promql.Scalar); ok {
		return promql.Vector{{T: scalar.T, F: scalar.V}}
	}
	vector, err := result.Vector()
	if err != nil {
		p.t.Fatalf("%s: %v", expr, err)
	}
	return vector
}

// evaluate does what Prometheus does with all groups at one time.
func (p *prom) evaluate(at time.Time) (firing []alert) {
	held := map[string]bool{}
	for _, group := range p.rules.Groups {
		for _, rule := range group.Rules {
			for _, sample := range p.ask(rule.Expr, at) {
				if rule.Record != "" {
					named := labels.NewBuilder(sample.Metric).Set(model.MetricNameLabel, rule.Record)
					p.stored.add(named.Labels(), at, sample.F)
					continue
				}
				key := rule.Alert + sample.Metric.String()
				held[key] = true
				if _, already := p.since[key]; !already {
					p.since[key] = at
				}
				if at.Sub(p.since[key]) >= time.Duration(rule.For) {
					firing = append(firing, p.fire(rule, sample, at))
				}
			}
		}
	}
	for key := range p.since {
		if !held[key] {
			delete(p.since, key)
		}
	}
	return firing
}

// fire writes an alert's texts, with Prometheus' own templates.
func (p *prom) fire(rule rulefmt.Rule, sample promql.Sample, at time.Time) alert {
	a := alert{name: rule.Alert, labels: sample.Metric.Map(), texts: map[string]string{}}
	delete(a.labels, model.MetricNameLabel)
	seen := template.AlertTemplateData(sample.Metric.Map(), nil, "", sample)
	for name, text := range rule.Annotations {
		const short = `{{$labels := .Labels}}{{$value := .Value}}`
		expanded, err := template.NewTemplateExpander(context.Background(), short+text, name, seen, model.TimeFromUnix(at.Unix()), nil, nil, nil).Expand()
		if err != nil {
			p.t.Errorf("%s: %s: %v", rule.Alert, name, err)
		}
		a.texts[name] = expanded
	}
	for name, value := range rule.Labels {
		a.labels[name] = value
	}
	return a
}

func (a alert) String() string { return fmt.Sprint(a.name, " ", a.labels) }
