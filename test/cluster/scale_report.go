package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// What is measured. The names and units are those of the output.
const (
	loadTime       = "load time"
	loadCPU        = "cpu of the load"
	changeAlone    = "change"
	changeAmid     = "change amid others"
	answerSuffix   = ", from the answer"
	changeCPU      = "cpu per change"
	residentLoaded = "resident after the load"
	resident       = "resident memory"
	pss            = "proportional memory"
	anonymous      = "anonymous memory"
	peak           = "peak memory"
	kernel         = "kernel memory"
)

var metrics = []struct{ name, unit string }{
	{changeAlone, "ms"}, {changeAlone + answerSuffix, "ms"}, {changeAmid, "ms"}, {changeAmid + answerSuffix, "ms"},
	{loadTime, "s"}, {loadCPU, "s"}, {changeCPU, "ms"},
	{residentLoaded, "MB"}, {resident, "MB"}, {pss, "MB"}, {anonymous, "MB"}, {peak, "MB"}, {kernel, "MB"},
}

// report has every single value that was measured, and of what.
type report struct {
	header  header
	proxies []string
	values  map[string]map[string][]float64 // of a proxy, of a metric
}

type header struct {
	Benchmark   string         `json:"benchmark"`
	Command     string         `json:"command"`
	Time        time.Time      `json:"time"`
	Machine     string         `json:"machine"`
	Kernel      string         `json:"kernel"`
	CPUs        int            `json:"cpus"`
	LoadAverage string         `json:"load_average"`
	Go          string         `json:"go"`
	Settings    map[string]any `json:"settings"`
}

// row is one metric of one proxy. Low and high are the 95 % interval of the median.
type row struct {
	Variant  string    `json:"variant"`
	Services int       `json:"services"`
	Metric   string    `json:"metric"`
	Unit     string    `json:"unit"`
	Median   float64   `json:"median"`
	Low      float64   `json:"low"`
	High     float64   `json:"high"`
	P99      float64   `json:"p99"`
	Min      float64   `json:"min"`
	Max      float64   `json:"max"`
	Samples  int       `json:"samples"`
	Ratio    *float64  `json:"ratio"` // of the medians, to millrace
	RatioP99 *float64  `json:"ratio_p99"`
	Values   []float64 `json:"values"`
}

func newReport(settings *scaleSettings) *report {
	release, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	load, _ := os.ReadFile("/proc/loadavg")
	return &report{
		header: header{
			Benchmark: "scale", Command: strings.Join(os.Args, " "), Time: time.Now().UTC(), Machine: runtime.GOARCH,
			Kernel: strings.TrimSpace(string(release)), CPUs: runtime.NumCPU(), LoadAverage: strings.TrimSpace(string(load)), Go: runtime.Version(),
			Settings: map[string]any{"services": settings.services, "rounds": settings.rounds, "changes": settings.changes,
				"amid": settings.amid, "pause_ms": settings.pause.Milliseconds(), "kubernetes": version("k8s.io/kubernetes")},
		},
		proxies: strings.Split(settings.proxies, ","),
		values:  map[string]map[string][]float64{},
	}
}

// take the values of an earlier run, if one is named.
func (r *report) take(file string) error {
	if file == "" {
		return nil
	}
	content, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("take an earlier run: %w", err)
	}
	var earlier struct{ Rows []row }
	if err := json.Unmarshal(content, &earlier); err != nil {
		return fmt.Errorf("take an earlier run from %s: %w", file, err)
	}
	for _, v := range earlier.Rows {
		for _, value := range v.Values {
			r.add(v.Variant, v.Metric, value)
		}
	}
	return nil
}

func (r *report) add(proxy, metric string, value float64) {
	if r.values[proxy] == nil {
		r.values[proxy] = map[string][]float64{}
	}
	r.values[proxy][metric] = append(r.values[proxy][metric], value)
}

// row of a metric, nil where nothing was measured.
func (r *report) row(proxy, metric, unit string) *row {
	values := r.values[proxy][metric]
	if len(values) == 0 {
		return nil
	}
	sorted := slices.Sorted(slices.Values(values))
	low, high := medianInterval(len(sorted))
	made := &row{
		Variant: proxy, Services: r.header.Settings["services"].(int), Metric: metric, Unit: unit, Samples: len(sorted),
		Median: quantile(sorted, 0.5), Low: sorted[low], High: sorted[high], P99: quantile(sorted, 0.99),
		Min: sorted[0], Max: sorted[len(sorted)-1], Values: values,
	}
	if ours := slices.Sorted(slices.Values(r.values["millrace"][metric])); proxy != "millrace" && len(ours) > 0 {
		made.Ratio, made.RatioP99 = ratio(made.Median, quantile(ours, 0.5)), ratio(made.P99, quantile(ours, 0.99))
	}
	return made
}

func ratio(a, b float64) *float64 {
	if b <= 0 {
		return nil
	}
	q := a / b
	return &q
}

// quantile is the smallest value that so large a share of all do not exceed.
func quantile(sorted []float64, share float64) float64 {
	return sorted[max(0, int(math.Ceil(share*float64(len(sorted))))-1)]
}

// medianInterval are the ranks between which the median is with 95 %, whatever the
// distribution: the number of samples below it is binomial, here by its normal
// approximation. Few samples tell no more than that it is between the outermost.
func medianInterval(samples int) (low, high int) {
	low = int(math.Floor((float64(samples) - 1.96*math.Sqrt(float64(samples))) / 2))
	low = max(0, low)
	return low, samples - 1 - low
}

func (r *report) write(to io.Writer, as string) error {
	if len(r.values) == 0 {
		return nil // an error says why
	}
	if as == "json" {
		var rows []*row
		for _, proxy := range r.proxies {
			for _, m := range metrics {
				if made := r.row(proxy, m.name, m.unit); made != nil {
					rows = append(rows, made)
				}
			}
		}
		encoder := json.NewEncoder(to)
		encoder.SetIndent("", "  ")
		return encoder.Encode(map[string]any{"header": r.header, "rows": rows})
	}
	fmt.Fprintf(to, "%v Services, %d turns of each, Kubernetes %v, Linux %s, %d CPUs, load %s\n\n",
		r.header.Settings["services"], r.header.Settings["rounds"], r.header.Settings["kubernetes"], r.header.Kernel, r.header.CPUs, r.header.LoadAverage)
	if err := r.writeChanges(to); err != nil {
		return err
	}
	fmt.Fprintln(to)
	return r.writeCosts(to)
}

// writeChanges is the table of what is measured often: its p50 and p99.
func (r *report) writeChanges(to io.Writer) error {
	table := tabwriter.NewWriter(to, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "from the write to the first packet, ms\tproxy\tp50\t[95 % interval]\tto millrace\tp99\tto millrace\tsamples")
	for _, metric := range []string{changeAlone, changeAlone + answerSuffix, changeAmid, changeAmid + answerSuffix} {
		for _, proxy := range r.proxies {
			if v := r.row(proxy, metric, "ms"); v != nil {
				fmt.Fprintf(table, "%s\t%s\t%s\t[%s, %s]\t%s\t%s\t%s\t%d\n", metric, proxy, short(v.Median), short(v.Low), short(v.High), times(v.Ratio), short(v.P99), times(v.RatioP99), v.Samples)
			}
		}
	}
	return table.Flush()
}

// writeCosts is the table of what is measured once in a turn: medians of the turns.
func (r *report) writeCosts(to io.Writer) error {
	table := tabwriter.NewWriter(to, 0, 0, 2, ' ', 0)
	fmt.Fprint(table, "medians of the turns")
	for _, proxy := range r.proxies {
		fmt.Fprintf(table, "\t%s", proxy)
	}
	for _, m := range metrics[4:] {
		fmt.Fprintf(table, "\n%s, %s", m.name, m.unit)
		for _, proxy := range r.proxies {
			fmt.Fprint(table, "\t")
			if v := r.row(proxy, m.name, m.unit); v != nil {
				fmt.Fprintf(table, "%s (%s)", short(v.Median), times(v.Ratio))
			}
		}
	}
	fmt.Fprintln(table)
	return table.Flush()
}

// short is a number with three digits that count.
func short(value float64) string {
	switch {
	case value >= 100:
		return fmt.Sprintf("%.0f", value)
	case value >= 10:
		return fmt.Sprintf("%.1f", value)
	}
	return fmt.Sprintf("%.2f", value)
}

func times(ratio *float64) string {
	if ratio == nil {
		return "1"
	}
	return short(*ratio)
}
