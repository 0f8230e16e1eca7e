package main

import "fmt"

// The types below are the part of Grafana's dashboard that is used here, by the names
// of its schema: https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/.

// schemaVersion is that of Grafana 12 and 13; both move older ones up by themselves, and
// read newer ones no worse for it.
const schemaVersion = 42

type dashboard struct {
	UID           string     `json:"uid"`
	Title         string     `json:"title"`
	Description   string     `json:"description"`
	Tags          []string   `json:"tags"`
	Timezone      string     `json:"timezone"`
	Editable      bool       `json:"editable"`
	GraphTooltip  int        `json:"graphTooltip"` // 1: one crosshair in all panels
	Refresh       string     `json:"refresh"`
	SchemaVersion int        `json:"schemaVersion"`
	Time          timeRange  `json:"time"`
	Templating    templating `json:"templating"`
	Links         []link     `json:"links"`
	Panels        []panel    `json:"panels"`
}

type timeRange struct {
	From string `json:"from"`
	To   string `json:"to"`
}

type templating struct {
	List []variable `json:"list"`
}

type variable struct {
	Type       string         `json:"type"`
	Name       string         `json:"name"`
	Label      string         `json:"label"`
	Query      any            `json:"query"` // text, or for Prometheus a query
	Datasource *source        `json:"datasource,omitempty"`
	Current    map[string]any `json:"current,omitempty"`
	IncludeAll bool           `json:"includeAll"`
	Multi      bool           `json:"multi"`
	Refresh    int            `json:"refresh"` // 2: when the time range changes
	Sort       int            `json:"sort,omitempty"`
}

type variableQuery struct {
	Query string `json:"query"`
	RefID string `json:"refId"`
}

type link struct {
	Title       string   `json:"title"`
	Type        string   `json:"type"`
	Icon        string   `json:"icon"`
	Tooltip     string   `json:"tooltip"`
	URL         string   `json:"url"`
	Tags        []string `json:"tags"`
	AsDropdown  bool     `json:"asDropdown"`
	TargetBlank bool     `json:"targetBlank"`
	IncludeVars bool     `json:"includeVars"`
	KeepTime    bool     `json:"keepTime"`
}

type source struct {
	Type string `json:"type"`
	UID  string `json:"uid"`
}

type panel struct {
	ID              int              `json:"id"`
	Type            string           `json:"type"`
	Title           string           `json:"title"`
	Description     string           `json:"description,omitempty"`
	GridPos         gridPos          `json:"gridPos"`
	Datasource      *source          `json:"datasource,omitempty"`
	Targets         []target         `json:"targets,omitempty"`
	FieldConfig     *fieldConfig     `json:"fieldConfig,omitempty"`
	Options         any              `json:"options,omitempty"`
	Transformations []transformation `json:"transformations,omitempty"`
	Collapsed       *bool            `json:"collapsed,omitempty"` // of rows
	Panels          *[]panel         `json:"panels,omitempty"`    // of rows that are collapsed
}

type gridPos struct {
	H int `json:"h"`
	W int `json:"w"`
	X int `json:"x"`
	Y int `json:"y"`
}

type target struct {
	RefID        string  `json:"refId"`
	Datasource   *source `json:"datasource"`
	Expr         string  `json:"expr"`
	LegendFormat string  `json:"legendFormat,omitempty"`
	Instant      bool    `json:"instant"`
	Range        bool    `json:"range"`
	Format       string  `json:"format"` // time_series or table
	EditorMode   string  `json:"editorMode"`
}

type fieldConfig struct {
	Defaults  fieldDefaults `json:"defaults"`
	Overrides []struct{}    `json:"overrides"`
}

type fieldDefaults struct {
	Unit       string      `json:"unit"`
	Decimals   *int        `json:"decimals,omitempty"`
	Min        *float64    `json:"min,omitempty"`
	Color      *color      `json:"color,omitempty"`
	Thresholds *thresholds `json:"thresholds,omitempty"`
	Custom     any         `json:"custom,omitempty"`
}

type color struct {
	Mode string `json:"mode"`
}

type thresholds struct {
	Mode  string `json:"mode"`
	Steps []step `json:"steps"`
}

type step struct {
	Color string   `json:"color"`
	Value *float64 `json:"value"` // null: from below all
}

type lines struct {
	DrawStyle         string `json:"drawStyle"`
	LineInterpolation string `json:"lineInterpolation"`
	LineWidth         int    `json:"lineWidth"`
	FillOpacity       int    `json:"fillOpacity"`
	ShowPoints        string `json:"showPoints"`
}

type timeseriesOptions struct {
	Legend  legend  `json:"legend"`
	Tooltip tooltip `json:"tooltip"`
}

type legend struct {
	DisplayMode string   `json:"displayMode"`
	Placement   string   `json:"placement"`
	ShowLegend  bool     `json:"showLegend"`
	Calcs       []string `json:"calcs"`
}

type tooltip struct {
	Mode string `json:"mode"`
	Sort string `json:"sort"`
}

type statOptions struct {
	ReduceOptions          reduceOptions `json:"reduceOptions"`
	ColorMode              string        `json:"colorMode"`
	GraphMode              string        `json:"graphMode"`
	JustifyMode            string        `json:"justifyMode"`
	TextMode               string        `json:"textMode"`
	Orientation            string        `json:"orientation"`
	WideLayout             bool          `json:"wideLayout"`
	ShowPercentChange      bool          `json:"showPercentChange"`
	PercentChangeColorMode string        `json:"percentChangeColorMode"`
}

type reduceOptions struct {
	Values bool     `json:"values"`
	Calcs  []string `json:"calcs"`
	Fields string   `json:"fields"`
}

type tableOptions struct {
	ShowHeader bool   `json:"showHeader"`
	CellHeight string `json:"cellHeight"`
}

type transformation struct {
	ID      string `json:"id"`
	Options any    `json:"options"`
}

type organize struct {
	ExcludeByName map[string]bool   `json:"excludeByName"`
	IndexByName   map[string]int    `json:"indexByName"`
	RenameByName  map[string]string `json:"renameByName"`
}

// prometheus is the data source that the user chooses at the top of the page.
var prometheus = &source{Type: "prometheus", UID: "${datasource}"}

// board is the dashboard with its panels in order.
func board() dashboard {
	d := dashboard{
		UID: "millrace", Title: "millrace", Tags: []string{"millrace", "network"},
		Description: "What millrace exports: agents, Services, flows, drops, connections, doctor.",
		Timezone:    "browser", Editable: true, GraphTooltip: 1, Refresh: "30s", SchemaVersion: schemaVersion,
		Time: timeRange{From: "now-1h", To: "now"},
		Links: []link{{Title: "What each alert means", Type: "link", Icon: "doc", Tags: []string{}, TargetBlank: true,
			URL: "https://github.com/millrace/millrace/blob/main/docs/monitoring.md"}},
		Templating: templating{List: []variable{
			{Type: "datasource", Name: "datasource", Label: "Data source", Query: "prometheus", Refresh: 1},
			asks("job", "Job", `label_values(millrace_build_info, job)`),
			asks("instance", "Node", `label_values(millrace_build_info{job=~"$job"}, instance)`),
		}},
	}
	y := 0
	for _, r := range rows {
		d.Panels = append(d.Panels, panel{ID: len(d.Panels) + 1, Type: "row", Title: r.title, GridPos: gridPos{H: 1, W: columns, Y: y},
			Collapsed: new(bool), Panels: &[]panel{}})
		y++
		x, high := 0, 0
		for _, c := range r.charts {
			if x+c.width > columns {
				x, y, high = 0, y+high, 0
			}
			p := c.panel()
			p.ID, p.GridPos.X, p.GridPos.Y = len(d.Panels)+1, x, y
			d.Panels = append(d.Panels, p)
			x, high = x+c.width, max(high, p.GridPos.H)
		}
		y += high
	}
	return d
}

// columns is the width of a dashboard.
const columns = 24

// asks is a variable whose values Prometheus knows.
func asks(name, label, query string) variable {
	return variable{Type: "query", Name: name, Label: label, Datasource: prometheus, Query: variableQuery{Query: query, RefID: name},
		Current: map[string]any{"text": "All", "value": "$__all"}, IncludeAll: true, Multi: true, Refresh: 2, Sort: 1}
}

// panel draws a chart.
func (c chart) panel() panel {
	p := panel{Type: c.kind, Title: c.title, Description: c.about, Datasource: prometheus,
		GridPos: gridPos{W: c.width, H: 8}, FieldConfig: &fieldConfig{Overrides: []struct{}{}}}
	p.FieldConfig.Defaults = fieldDefaults{Unit: c.unit, Thresholds: &thresholds{Mode: "absolute", Steps: []step{{Color: "green"}}}}
	for i, q := range c.queries {
		t := target{RefID: string(rune('A' + i)), Datasource: prometheus, Expr: q.text(), LegendFormat: q.legend,
			Format: "time_series", Range: true, EditorMode: "code"}
		if c.kind != lined {
			t.Instant, t.Range = true, false
		}
		if c.kind == tabled {
			t.Format = "table"
		}
		p.Targets = append(p.Targets, t)
	}
	switch c.kind {
	case lined:
		zero := 0.0
		p.FieldConfig.Defaults.Min, p.FieldConfig.Defaults.Color = &zero, &color{Mode: "palette-classic"}
		p.FieldConfig.Defaults.Custom = lines{DrawStyle: "line", LineInterpolation: "linear", LineWidth: 1, FillOpacity: 10, ShowPoints: "never"}
		p.Options = timeseriesOptions{
			Legend:  legend{DisplayMode: "table", Placement: "bottom", ShowLegend: true, Calcs: []string{"lastNotNull", "max"}},
			Tooltip: tooltip{Mode: "multi", Sort: "desc"},
		}
	case counted:
		p.GridPos.H = 4
		p.FieldConfig.Defaults.Color = &color{Mode: "thresholds"}
		if c.bad > 0 {
			p.FieldConfig.Defaults.Thresholds.Steps = append(p.FieldConfig.Defaults.Thresholds.Steps, step{Color: "red", Value: &c.bad})
		}
		p.Options = statOptions{ReduceOptions: reduceOptions{Calcs: []string{"lastNotNull"}}, ColorMode: "value", GraphMode: "none", JustifyMode: "auto",
			TextMode: "auto", Orientation: "auto", WideLayout: true, PercentChangeColorMode: "standard"}
	case tabled:
		p.FieldConfig.Defaults.Custom = struct{}{}
		p.Options = tableOptions{ShowHeader: true, CellHeight: "sm"}
		out := organize{ExcludeByName: map[string]bool{"Time": true, "__name__": true}, IndexByName: map[string]int{}, RenameByName: map[string]string{}}
		for i, name := range c.columns {
			out.IndexByName[name] = i
		}
		if c.unit == "none" {
			out.ExcludeByName["Value"] = true // it is always 1
		}
		p.Transformations = []transformation{{ID: "organize", Options: out}}
	default:
		panic(fmt.Sprintf("a chart of kind %q", c.kind))
	}
	return p
}
