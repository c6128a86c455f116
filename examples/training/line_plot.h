#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "file_error.h"        // defines: FileError
#include "training/trainer.h"  // defines: CurvePoint

/// A curve of a plot; a faint one lies in the background.
struct PlotSeries {
  std::string name;
  std::vector<CurvePoint> points;
  bool faint = false;
  bool dots = false;
};

namespace line_plot_detail {

inline std::string number_text(double value) {
  std::ostringstream text;
  text.precision(4);
  text << value;
  return text.str();
}

/// Round numbers from 0 to `high`, about eight of them.
inline std::vector<double> linear_ticks(double high) {
  const double raw = high / 8;
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  double step = 10.0 * power;
  for (const double factor : {5.0, 2.0, 1.0}) {
    if (factor * power >= raw) step = factor * power;
  }
  std::vector<double> marks;
  for (int i = 0; i * step <= high * (1 + 1e-9); ++i) marks.push_back(i * step);
  return marks;
}

/// 1, 2 and 5 times the powers of ten from `low` to `high`.
inline std::vector<double> logarithmic_ticks(double low, double high) {
  std::vector<double> marks;
  for (double power = std::pow(10.0, std::floor(std::log10(low))); power <= high; power *= 10.0) {
    for (const double factor : {1.0, 2.0, 5.0}) {
      if (factor * power >= low && factor * power <= high) marks.push_back(factor * power);
    }
  }
  return marks;
}

}  // namespace line_plot_detail

/// Writes curves of positive values as an SVG picture of 760 x 440; the vertical axis is logarithmic.
inline void write_line_plot(const std::string& path, const std::string& title, const std::string& x_label,
                            const std::string& y_label, const std::vector<PlotSeries>& series) {
  using namespace line_plot_detail;
  constexpr double kLeft = 70, kTop = 50, kWidth = 660, kHeight = 330, kSmallest = 1e-6;
  const std::array<const char*, 3> colours = {"#3b6ea8", "#c2522d", "#4d8b57"};
  double x_high = 1e-9, y_low = INFINITY, y_high = kSmallest;
  for (const auto& one : series) {
    for (const auto& point : one.points) {
      x_high = std::max(x_high, point.step);
      y_low = std::min(y_low, std::max(point.loss, kSmallest));
      y_high = std::max(y_high, point.loss);
    }
  }
  y_low /= 1.15;
  y_high *= 1.15;
  const auto x_of = [&](double x) { return kLeft + kWidth * x / x_high; };
  const auto y_of = [&](double y) {
    return kTop + kHeight * std::log(y_high / std::max(y, kSmallest)) / std::log(y_high / y_low);
  };

  std::ostringstream svg;
  svg.precision(5);
  svg << "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 760 440\" width=\"760\" height=\"440\" "
         "font-family=\"Helvetica, Arial, sans-serif\" font-size=\"13\" fill=\"#333\">\n"
         "<rect width=\"760\" height=\"440\" fill=\"white\"/>\n"
      << "<text x=\"" << kLeft << "\" y=\"26\" font-size=\"16\" font-weight=\"bold\">" << title << "</text>\n";
  for (const double y : logarithmic_ticks(y_low, y_high)) {
    svg << "<line x1=\"" << kLeft << "\" x2=\"" << kLeft + kWidth << "\" y1=\"" << y_of(y) << "\" y2=\"" << y_of(y)
        << "\" stroke=\"#e3e3e3\"/>\n<text x=\"" << kLeft - 8 << "\" y=\"" << y_of(y) + 4 << "\" text-anchor=\"end\">"
        << number_text(y) << "</text>\n";
  }
  for (const double x : linear_ticks(x_high)) {
    svg << "<text x=\"" << x_of(x) << "\" y=\"" << kTop + kHeight + 20 << "\" text-anchor=\"middle\">" << number_text(x)
        << "</text>\n";
  }
  svg << "<line x1=\"" << kLeft << "\" x2=\"" << kLeft + kWidth << "\" y1=\"" << kTop + kHeight << "\" y2=\""
      << kTop + kHeight << "\" stroke=\"#888\"/>\n"
      << "<text x=\"" << kLeft + kWidth / 2 << "\" y=\"" << kTop + kHeight + 42 << "\" text-anchor=\"middle\">"
      << x_label << "</text>\n<text transform=\"translate(20 " << kTop + kHeight / 2
      << ") rotate(-90)\" text-anchor=\"middle\">" << y_label << "</text>\n";
  for (std::size_t i = 0; i < series.size(); ++i) {
    const auto* const colour = colours[i % colours.size()];
    svg << "<polyline fill=\"none\" stroke=\"" << colour << "\" stroke-width=\"" << (series[i].faint ? 1 : 2)
        << "\" stroke-opacity=\"" << (series[i].faint ? 0.45 : 1.0) << "\" stroke-linejoin=\"round\" points=\"";
    for (const auto& point : series[i].points) svg << x_of(point.step) << ',' << y_of(point.loss) << ' ';
    svg << "\"/>\n";
    for (const auto& point : series[i].points) {
      if (series[i].dots) {
        svg << "<circle cx=\"" << x_of(point.step) << "\" cy=\"" << y_of(point.loss) << "\" r=\"3.5\" fill=\"" << colour
            << "\"/>\n";
      }
    }
    const double key = kTop + 14 + 20 * static_cast<double>(i);
    svg << "<line x1=\"560\" x2=\"590\" y1=\"" << key << "\" y2=\"" << key << "\" stroke=\"" << colour
        << "\" stroke-width=\"2\"/>\n<text x=\"598\" y=\"" << key + 4 << "\">" << series[i].name << "</text>\n";
  }
  svg << "</svg>\n";
  std::ofstream file(path);
  if (!(file << svg.str() << std::flush)) throw FileError(path, {"can't be written"});
}
